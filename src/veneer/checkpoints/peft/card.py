"""A model card: an adapter's method, base, origin, metrics and use, as Markdown with the front matter that model hubs read.

Everything in it comes from the adapter's folder, its receipt and, where given, its run. Unknown entries are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from veneer._version import __version__
from veneer.adapters.adapter import Adapter

FOLDER = "path/to/this/folder"
"""Stands in a card for the place of the adapter, which the writer of a folder does not know."""
_RECEIPT = {
    "data_sha256": "data (SHA-256)",
    "template_sha256": "chat template (SHA-256)",
    "tokenizer_sha256": "tokenizer (SHA-256)",
    "tensors": "tensors (SHA-256)",
    "seed": "seed",
    "steps": "steps",
    "held_out_loss": "held-out loss",
    "veneer_version": "trained with Veneer",
    "version": "written with Veneer",
}


def model_card(
    adapter: Adapter,
    *,
    base: str | None,
    receipt: Mapping[str, Any],
    command: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    folder: str = FOLDER,
) -> str:
    """The card as Markdown. command: the command that made the adapter. metrics: name -> number, shown unchanged."""
    lines = [*_front_matter(adapter, base), f"# {adapter.name}", ""]
    lines += [f"A {adapter.method.label} adapter{f' for `{base}`' if base else ''}.", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in _summary(adapter).items()), ""]
    known = {_RECEIPT[key]: receipt[key] for key in _RECEIPT if receipt.get(key) is not None}
    if known:
        lines += ["## Origin", "", *(f"- {name}: `{value}`" for name, value in known.items()), ""]
    if receipt.get("notes"):
        lines += [*(f"- {note}" for note in receipt["notes"]), ""]
    if receipt.get("parents"):
        lines += ["Made from:", "", *(f"- {_parent(parent)}" for parent in receipt["parents"]), ""]
    if receipt.get("made_by"):
        how = ", ".join(f"{key} {value}" for key, value in receipt["made_by"].items())
        lines += [f"By: {how}", ""]
    if metrics:
        lines += ["## Metrics", "", "| | |", "| --- | --- |"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in metrics.items()] + [""]
    if command:
        lines += ["## Command", "", "```", command, "```", ""]
    return "\n".join([*lines, *_use(adapter, base, folder, receipt)])


def _front_matter(adapter: Adapter, base: str | None) -> list[str]:
    named = [f"base_model: {json.dumps(base)}"] if base else []
    tags = [f"- {tag}" for tag in ("veneer", *adapter.method.tags)]
    return ["---", *named, "library_name: peft", "tags:", *tags, "---", ""]


def _summary(adapter: Adapter) -> dict[str, str]:
    ranks = Counter(adapter.rank(site) for site in adapter.tensors)
    scales = Counter(f"{adapter.scale(site):.4g}" for site in adapter.tensors)
    modules = Counter(site.rpartition(".")[2] for site in adapter.tensors)
    summary = {
        "sites": str(len(adapter.tensors)),
        "layers": ", ".join(f"{name} ({count})" for name, count in sorted(modules.items())),
        "rank": ", ".join(f"{rank} ({count} sites)" for rank, count in sorted(ranks.items())),
        "scale": ", ".join(f"{scale} ({count} sites)" for scale, count in sorted(scales.items())),
        "parameters": f"{adapter.num_parameters():,}",
    }
    if not adapter.method.low_rank:
        del summary["rank"], summary["scale"]
    if adapter.overrides:
        summary["replaced or added"] = ", ".join(
            f"{name} ({', '.join(sorted(tensors))})" for name, tensors in sorted(adapter.overrides.items())
        )
    return summary


def _parent(parent: Mapping[str, Any]) -> str:
    digest = f", tensors `{str(parent['tensors'])[:16]}`" if "tensors" in parent else ""
    return f"{parent.get('name')} x {parent.get('weight')}{digest}"


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _stops(receipt: Mapping[str, Any]) -> list[str]:
    stops = receipt.get("stop_tokens")
    if not isinstance(stops, Mapping) or not stops:
        return []
    named = ", ".join(f"`{text}` ({token})" for text, token in stops.items())
    return [
        f"Answers end with {named}. Tell programs that only know the base: `eos_token_id={list(stops.values())}`.",
        "",
    ]


def _use(adapter: Adapter, base: str | None, folder: str, receipt: Mapping[str, Any]) -> list[str]:
    named = json.dumps(base or "the base's name or folder")
    return [
        "## Use",
        "",
        "```python",
        "import veneer",
        "",
        f"base = veneer.load_base({named})",
        "bank = veneer.attach(base.model)",
        f"bank.load({json.dumps(folder)}, name={json.dumps(adapter.name)})",
        f"with bank.use({json.dumps(adapter.name)}):",
        "    ...",
        "```",
        "",
        *_stops(receipt),
        f"Card written by Veneer {__version__}.",
        "",
    ]
