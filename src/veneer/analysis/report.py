"""The spectra of an adapter as one HTML file, without scripts or external resources.

Plots are inline SVG. Without matplotlib the page has tables only, and says so.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from veneer._files import replace_text
from veneer._version import __version__
from veneer.analysis.plots import figures, modules_of, picture_bytes
from veneer.analysis.spectra import SAME_SEED, AdapterSpectra, SiteSpectrum, mean_text, short_text
from veneer.errors import ComposeError

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-size:13px;display:block;overflow-x:auto}
td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
td:first-child,th:first-child{text-align:left;font-family:ui-monospace,monospace}
svg{max-width:100%;height:auto}
figure{margin:1.5rem 0}
dt{font-weight:600}
dd{margin:0 0 .3rem 1.5rem;color:#555}
summary{cursor:pointer;margin-top:1rem}
p.note{color:#555}
"""
_COLUMNS: Mapping[str, tuple[str, Callable[[SiteSpectrum], float | None]]] = {
    "rank": ("number of directions of the change; with DoRA's magnitudes all of them", lambda site: site.rank),
    "norm": ("Frobenius norm of the change d = W' - W", lambda site: site.norm),
    "stable rank": (
        "square norm of d over the square of its largest singular value: near 1 if one direction dominates",
        lambda site: site.stable_rank,
    ),
    "effective rank": ("exp of the entropy of the singular values of d", lambda site: site.effective_rank),
    "change/weight": ("norm of d over that of the base weight W", lambda site: site.ratio),
    "amplification": (
        "norm of d over that of W in the leading directions of d: above 1 the change is larger there than the base",
        lambda site: site.amplification,
    ),
    "intruders": (
        "leading directions of W' that W does not have; their number grows with forgetting",
        lambda site: None if site.intruders is None else float(site.intruders.count),
    ),
}
"""Column -> its meaning, and the value of a site."""
_OVERLAP_LEGEND = {
    "phi": "overlap of two spans of directions: 1 if one contains the other, 0 if they are orthogonal",
    "by chance": "phi of random spans of these sizes",
    "cosine": "of the two changes as vectors: 1 the same change, 0 orthogonal, below 0 opposed",
}


def write_html(spectra: AdapterSpectra, file: Path) -> None:
    """Write the report in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, html_report(spectra))


def html_report(spectra: AdapterSpectra) -> str:
    """The page as text."""
    name = html.escape(spectra.name)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{name}: spectra of an adapter</title><style>{_STYLE}</style></head><body>",
        f"<h1>{name}</h1>",
        f"<p>{_summary(spectra)}</p>",
        "<h2>By module</h2>",
        '<p class="note">Means over blocks, of intruders too.</p>',
        _table(("module", "sites", *_COLUMNS), _modules(spectra.sites)),
        _legend({name: meaning for name, (meaning, _) in _COLUMNS.items()}),
    ]
    if spectra.subspaces:
        parts += [
            f"<h2>Against {html.escape(str(spectra.against))}</h2>",
            *([f'<p class="note">{html.escape(SAME_SEED)}</p>'] if spectra.one_seed else []),
            _overlap_table(spectra),
            _legend(_OVERLAP_LEGEND),
        ]
    parts += _plots(spectra)
    rows = [[site.site, *(mean_text([value(site)]) for _, value in _COLUMNS.values())] for site in spectra.sites]
    parts += [f"<details><summary>All {len(rows)} sites</summary>{_table(('site', *_COLUMNS), rows)}</details>"]
    parts += [f'<p class="note">Made by Veneer {html.escape(__version__)}.</p>', "</body></html>"]
    return "\n".join(parts) + "\n"


def _summary(spectra: AdapterSpectra) -> str:
    method = {"lora": "LoRA", "dora": "DoRA"}.get(spectra.method, spectra.method)
    norm = short_text(math.hypot(*(site.norm for site in spectra.sites)))
    text = f"A {html.escape(method)} adapter at {len(spectra.sites)} sites; norm of the whole change {norm}."
    if spectra.intruders is not None:
        text += f" {spectra.intruders} intruder dimensions."
    if spectra.expert_tokens:
        counts = [count for stack in spectra.expert_tokens.values() for count in stack]
        text += f" Experts: {len(counts)}, trained on {min(counts):,} to {max(counts):,} tokens each"
        text += f", {counts.count(0)} on none." if 0 in counts else "."
    if spectra.correlation is not None:
        text += f" Correlation of direction and magnitude change over sites: {spectra.correlation:+.2f}."
    return text


def _modules(sites: Sequence[SiteSpectrum]) -> list[list[str]]:
    rows = []
    for module in modules_of(sites):
        found = [site for site in sites if site.module == module]
        rows.append(
            [module, str(len(found)), *(mean_text([value(site) for site in found]) for _, value in _COLUMNS.values())]
        )
    return rows


def _overlap_table(spectra: AdapterSpectra) -> str:
    rows = []
    for module in modules_of(spectra.sites):
        pairs = [spectra.subspaces[s.site] for s in spectra.sites if s.module == module and s.site in spectra.subspaces]
        if pairs:
            columns = ("whole_in", "chance_in", "whole_out", "chance_out", "cosine")
            rows.append([module, *(mean_text([getattr(pair, column) for pair in pairs]) for column in columns)])
    return _table(("module", "phi of inputs", "by chance", "phi of outputs", "by chance", "cosine"), rows)


def _plots(spectra: AdapterSpectra) -> list[str]:
    try:
        made = figures(spectra)
    except ComposeError as error:
        return [f'<p class="note">There are no plots: {html.escape(str(error))}.</p>']
    parts = ["<h2>Plots</h2>"]
    for figure in made.values():
        text = picture_bytes(figure, "svg").decode()
        parts.append(f"<figure>{text[text.index('<svg') :]}</figure>")
    return parts


def _legend(entries: Mapping[str, str]) -> str:
    body = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in entries.items())
    return f"<details><summary>What the columns mean</summary><dl>{body}</dl></details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
