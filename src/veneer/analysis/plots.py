"""Plots of the spectra of an adapter, as SVG and PNG. Needs matplotlib: pip install 'veneer[plot]'.

    spectra      singular values of each module on a log axis: the median over blocks, and the range
    heat maps    block x module, one for each metric of a site
    overlap      phi(i, j) between two adapters, mean over blocks, one panel for each module and side
    magnitudes   histogram of the magnitude change of all outputs

Colours are safe for colour-blind readers (cividis; Okabe and Ito). The global state of matplotlib is not changed, and the same numbers
give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.analysis.spectra import AdapterSpectra, SiteSpectrum, position_of
from veneer.errors import ComposeError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
HEAT_MAPS: Mapping[str, tuple[str, str, Callable[[SiteSpectrum], float | None]]] = {
    "norm": ("norm of the change", "‖d‖", lambda site: site.norm),
    "ratio": ("norm of the change against the base weight", "‖d‖ / ‖W‖", lambda site: site.ratio),
    "stable_rank": ("stable rank of the change", "‖d‖² / s₁²", lambda site: site.stable_rank),
    "effective_rank": ("effective rank of the change", "exp(entropy of s)", lambda site: site.effective_rank),
    "amplification": ("amplification factor", "‖d‖ / ‖UᵀWV‖", lambda site: site.amplification),
    "intruders": (
        "intruder dimensions",
        "number",
        lambda site: None if site.intruders is None else float(site.intruders.count),
    ),
    "magnitude_change": (
        "change of magnitude, mean over outputs",
        "|‖W′ₒ‖ − ‖Wₒ‖|",
        lambda site: site.magnitude_change,
    ),
    "direction_change": (
        "change of direction, mean over outputs",
        "1 − cos(W′ₒ, Wₒ)",
        lambda site: site.direction_change,
    ),
}
"""Name -> title, label of the colour bar, and the value of a site. d is the change, W the base weight, W′ their sum."""
_COUNTS = ("intruders",)
_PANELS = 4
_MANY = 64
"""Number of singular values above which their axis is logarithmic."""
_FAR = 8
"""Ratio of the largest site to the median above which the colours are logarithmic."""
_SETTINGS: dict[str, Any] = {"svg.hashsalt": "veneer", "svg.fonttype": "none", "font.size": 9}


def figures(spectra: AdapterSpectra) -> dict[str, Any]:
    """All plots of the available numbers by name, as matplotlib figures. Raises ComposeError without matplotlib."""
    made = {"spectra": _spectra(spectra)}
    for key in HEAT_MAPS:
        if (picture := _heat_map(spectra, key)) is not None:
            made[key] = picture
    for key in ("expert_norm", "expert_tokens"):
        if (picture := _experts(spectra, key)) is not None:
            made[key] = picture
    if spectra.subspaces:
        made["overlap"] = _overlap(spectra)
    if spectra.magnitudes:
        made["magnitudes"] = _magnitudes(spectra)
    return made


def write_plots(spectra: AdapterSpectra, folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write all plots into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures(spectra).items():
        for kind in formats:
            file = folder / f"{name}.{kind}"
            file.write_bytes(picture_bytes(figure, kind))
            files.append(file)
    return files


def picture_bytes(figure: Any, kind: str) -> bytes:
    """A figure as SVG or PNG."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(rc=_SETTINGS):  # type: ignore[arg-type,unused-ignore]
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def modules_of(sites: Sequence[SiteSpectrum]) -> list[str]:
    """The modules of sites ("mlp.up_proj"), in order of appearance."""
    return list(dict.fromkeys(site.module for site in sites))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ComposeError("plots need matplotlib, which is not installed: pip install 'veneer[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _spectra(spectra: AdapterSpectra) -> Any:
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for number, module in enumerate(modules_of(spectra.sites)):
        values = [site.singular_values for site in spectra.sites if site.module == module and site.singular_values]
        if not values:
            continue
        longest = max(map(len, values))
        columns = [sorted(v[i] for v in values if len(v) > i) for i in range(longest)]
        x = range(1, longest + 1)
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        axes.plot(x, [column[len(column) // 2] for column in columns], style, color=colour, label=module)
        axes.fill_between(x, [c[0] for c in columns], [c[-1] for c in columns], color=colour, alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    most = max((len(site.singular_values) for site in spectra.sites), default=0)
    if most > _MANY:  # the first few matter, and hundreds follow
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        _whole_numbers(axes.xaxis)
    axes.set(
        xlabel="number of the singular value",
        ylabel="singular value of d",
        title=f"{spectra.name}: spectra of the change (median over blocks, and their range)",
    )
    axes.legend(fontsize=7, ncols=2, framealpha=0.6)
    return figure


def _heat_map(spectra: AdapterSpectra, key: str) -> Any | None:
    title, measure, value = HEAT_MAPS[key]
    values: dict[tuple[int, str], list[float | None]] = {}
    for site in spectra.sites:
        if site.block is not None:
            values.setdefault((site.block, site.module), []).append(value(site))
    if not values or any(number is None for numbers in values.values() for number in numbers):
        return None
    # The experts of a block share a cell: the mean of their values.
    cells = {key: math.fsum(number or 0.0 for number in numbers) / len(numbers) for key, numbers in values.items()}
    modules = [module for module in modules_of(spectra.sites) if any(key[1] == module for key in cells)]
    blocks = sorted({block for block, _ in cells if block is not None})
    grid = [[_finite(cells.get((block, module))) for block in blocks] for module in modules]
    figure = _figure(2.5 + 0.22 * max(18, len(blocks)), 1.2 + 0.3 * max(3, len(modules)))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest", norm=_norm(grid, key in _COUNTS))
    axes.set_yticks(range(len(modules)), modules)
    step = -(-len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set(xlabel="block", title=f"{spectra.name}: {title}")
    bar = figure.colorbar(image, label=measure)
    if key in _COUNTS:
        _whole_numbers(bar.ax.yaxis)
    return figure


def _experts(spectra: AdapterSpectra, key: str) -> Any | None:
    """A heat map over blocks and experts: the norm of an expert's whole change, or the tokens that it was trained on."""
    cells: dict[tuple[int, int], float] = {}
    if key == "expert_norm":
        for site in spectra.sites:
            if site.expert is not None and site.block is not None:
                cells[site.block, site.expert] = math.hypot(cells.get((site.block, site.expert), 0.0), site.norm)
    else:
        for stack, counts in spectra.expert_tokens.items():
            block = position_of(f"{stack}.")[0]
            cells |= {(block, expert): float(count) for expert, count in enumerate(counts) if block is not None}
    if not cells:
        return None
    blocks, experts = sorted({block for block, _ in cells}), sorted({expert for _, expert in cells})
    grid = [[_finite(cells.get((block, expert))) for expert in experts] for block in blocks]
    figure = _figure(2.5 + 0.22 * max(18, min(64, len(experts))), 1.4 + 0.25 * max(3, len(blocks)))
    axes = figure.subplots()
    image = axes.imshow(
        grid, aspect="auto", cmap="cividis", interpolation="nearest", norm=_norm(grid, key == "expert_tokens")
    )
    for axis, numbers in ((axes.xaxis, experts), (axes.yaxis, blocks)):
        step = -(-len(numbers) // 16)
        axis.set_ticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    title, measure = (
        ("norm of each expert's change", "‖d‖") if key == "expert_norm" else ("tokens in training", "tokens")
    )
    axes.set(xlabel="expert", ylabel="block", title=f"{spectra.name}: {title}")
    figure.colorbar(image, label=measure)
    return figure


def _norm(grid: Sequence[Sequence[float]], counts: bool) -> Any:
    """Linear colours; logarithmic ones if an outlier would give all other sites one colour."""
    from matplotlib.colors import LogNorm, Normalize

    values = sorted(value for row in grid for value in row if math.isfinite(value))
    if not values or counts:
        return Normalize(0, max(1.0, *values) if values else 1.0)
    if values[0] > 0 and values[-1] > _FAR * values[len(values) // 2]:
        return LogNorm(values[0], values[-1])
    return Normalize(0, values[-1] or 1.0)


def _overlap(spectra: AdapterSpectra) -> Any:
    pairs = {
        module: [spectra.subspaces[s.site] for s in spectra.sites if s.module == module and s.site in spectra.subspaces]
        for module in modules_of(spectra.sites)
    }
    shown = [(module, side) for module, found in pairs.items() if found for side in ("reads", "writes")]
    columns = min(_PANELS, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(1.2 + 1.9 * columns, 0.8 + 1.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, (module, side) in zip(panels.flat, shown, strict=False):
        table = _mean([pair.phi_in if side == "reads" else pair.phi_out for pair in pairs[module]])
        extent = (0.5, len(table[0]) + 0.5, 0.5, len(table) + 0.5)
        image = axes.imshow(
            table, vmin=0, vmax=1, cmap="cividis", origin="lower", interpolation="nearest", aspect="auto", extent=extent
        )
        axes.set_title(f"{module}, {side}", fontsize=7)
        axes.tick_params(labelsize=7)
        _whole_numbers(axes.xaxis)
        _whole_numbers(axes.yaxis)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=panels, label="φ(i, j): 1 one span contains the other, 0 orthogonal", fraction=0.03)
    figure.supxlabel(f"j: leading directions of {spectra.against}", fontsize=8)
    figure.supylabel(f"i: leading directions of {spectra.name}", fontsize=8)
    figure.suptitle(f"overlap of {spectra.name} and {spectra.against} (mean over blocks)", fontsize=9)
    return figure


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def _magnitudes(spectra: AdapterSpectra) -> Any:
    figure = _figure(6, 3.4)
    axes = figure.subplots()
    values = [100 * _finite(value) for changes in spectra.magnitudes.values() for value in changes]
    values = [value for value in values if math.isfinite(value)]
    axes.hist(values, bins=80, color=COLOURS[0])
    axes.set_yscale("log")
    axes.set(
        xlabel="‖W′ₒ‖ / ‖Wₒ‖ − 1, %", ylabel="number of outputs", title=f"{spectra.name}: change of magnitude by output"
    )
    return figure


def _mean(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Mean over tables, entry by entry, over the tables that have the entry."""
    rows, columns = max(map(len, tables)), max(len(t[0]) if t else 0 for t in tables)
    grid = []
    for i in range(rows):
        cells = [[t[i][j] for t in tables if len(t) > i and len(t[i]) > j] for j in range(columns)]
        grid.append([sum(cell) / len(cell) if cell else math.nan for cell in cells])
    return grid


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
