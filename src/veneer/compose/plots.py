"""Pictures of an adapter's inside, as SVG and PNG. Needs matplotlib, which is an extra: pip install 'veneer[plot]'.

    spectra      singular values of each kind of layer on a log axis: the median over blocks, and their range
    heat maps    block x module, one for each figure that a site has
    overlap      phi(i, j) between two adapters, mean over blocks, one panel for each kind of layer
    magnitudes   how many outputs grew or shrank, and by how much

Colours are from maps and palettes that colour-blind readers can tell apart (cividis; Okabe and Ito). No global state of matplotlib is
touched, and the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.compose.spectra import AdapterSpectra, SiteSpectrum
from veneer.errors import ComposeError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
FIGURES: Mapping[str, tuple[str, Callable[[SiteSpectrum], float | None]]] = {
    "norm": ("norm of the change", lambda site: site.norm),
    "ratio": ("norm of the change against the base weight", lambda site: site.ratio),
    "stable_rank": ("stable rank", lambda site: site.stable_rank),
    "effective_rank": ("effective rank", lambda site: site.effective_rank),
    "amplification": ("amplification factor", lambda site: site.amplification),
    "intruders": ("intruder dimensions", lambda site: None if site.intruders is None else float(site.intruders.count)),
    "magnitude_change": ("change of magnitude", lambda site: site.magnitude_change),
    "direction_change": ("change of direction", lambda site: site.direction_change),
}
_SETTINGS: dict[str, Any] = {"svg.hashsalt": "veneer", "svg.fonttype": "none", "font.size": 9}


def figures(spectra: AdapterSpectra) -> dict[str, Any]:
    """Every picture that the numbers allow, by name, as matplotlib figures.

    Raises ComposeError where matplotlib is not there.
    """
    made = {"spectra": _spectra(spectra)}
    for key, (title, value) in FIGURES.items():
        if (picture := _heat_map(spectra.sites, title, value)) is not None:
            made[key] = picture
    if spectra.subspaces:
        made["overlap"] = _overlap(spectra)
    if spectra.magnitudes:
        made["magnitudes"] = _magnitudes(spectra)
    return made


def write_plots(spectra: AdapterSpectra, folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write every picture into a folder; returns the files."""
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
    """Kinds of layers, in the order in which they come."""
    return list(dict.fromkeys(site.module for site in sites))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ComposeError("pictures need matplotlib, which is not installed: pip install 'veneer[plot]'") from None
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
    axes.set(
        xlabel="singular value",
        ylabel="size",
        title=f"{spectra.name}: spectrum of the change (median and range over blocks)",
    )
    axes.legend(fontsize=7, ncols=2)
    return figure


def _heat_map(sites: Sequence[SiteSpectrum], title: str, value: Callable[[SiteSpectrum], float | None]) -> Any | None:
    cells = {(s.block, s.module): value(s) for s in sites if s.block is not None}
    if not cells or any(number is None for number in cells.values()):
        return None
    modules = [module for module in modules_of(sites) if any(key[1] == module for key in cells)]
    blocks = sorted({block for block, _ in cells if block is not None})
    grid = [[_finite(cells.get((block, module))) for block in blocks] for module in modules]
    figure = _figure(2.5 + 0.22 * max(8, len(blocks)), 1.2 + 0.3 * len(modules))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_yticks(range(len(modules)), modules)
    step = max(1, len(blocks) // 12)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set(xlabel="block", title=title)
    figure.colorbar(image)
    return figure


def _overlap(spectra: AdapterSpectra) -> Any:
    modules = [
        m
        for m in modules_of(spectra.sites)
        if any(s.module == m and s.site in spectra.subspaces for s in spectra.sites)
    ]
    figure = _figure(2.2 * len(modules) + 0.8, 4.6)
    panels = figure.subplots(2, len(modules), squeeze=False)
    image = None
    for column, module in enumerate(modules):
        pairs = [spectra.subspaces[s.site] for s in spectra.sites if s.module == module and s.site in spectra.subspaces]
        for row, (side, tables) in enumerate(
            (("reads", [pair.phi_in for pair in pairs]), ("writes", [pair.phi_out for pair in pairs]))
        ):
            axes = panels[row][column]
            image = axes.imshow(_mean(tables), vmin=0, vmax=1, cmap="cividis", origin="lower", interpolation="nearest")
            axes.set_title(f"{module}, {side}", fontsize=7)
            axes.set_xlabel("j", fontsize=7)
            axes.set_ylabel("i", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=panels, label="phi(i, j)")
    figure.suptitle(f"what {spectra.name} (i) and {spectra.against} (j) have in common", fontsize=9)
    return figure


def _magnitudes(spectra: AdapterSpectra) -> Any:
    figure = _figure(6, 3.4)
    axes = figure.subplots()
    values = [100 * _finite(value) for own in spectra.magnitudes.values() for value in own]
    values = [value for value in values if math.isfinite(value)]
    axes.hist(values, bins=80, color=COLOURS[0])
    axes.set_yscale("log")
    axes.set(xlabel="change of ||W_o||, %", ylabel="outputs", title=f"{spectra.name}: change of magnitude by output")
    return figure


def _mean(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Mean over tables; where their sizes differ, over those that reach there."""
    rows, columns = max(map(len, tables)), max(len(t[0]) if t else 0 for t in tables)
    grid = []
    for i in range(rows):
        cells = [[t[i][j] for t in tables if len(t) > i and len(t[i]) > j] for j in range(columns)]
        grid.append([sum(cell) / len(cell) if cell else math.nan for cell in cells])
    return grid


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
