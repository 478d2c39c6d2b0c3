"""``veneer merge ADAPTER --base MODEL --out DIR``: write the base with adapters merged into its weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import counted, note, status
from veneer.checkpoints.locate import QUANTIZED
from veneer.cli._output import as_json, difference_from, percent, print_lines, table
from veneer.cli._parents import checked_base, parse_mix, stops_of, task_of
from veneer.cli._parser import add_device, add_force, add_json, add_quantize, add_sites, at_least
from veneer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from veneer.adapters import Adapter
    from veneer.checkpoints.base_files import Skeleton
    from veneer.deltas.parents import Parent
    from veneer.merge.folder import MergeReport

    Check = Callable[[Path, MergeReport], None]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", nargs="+", metavar="ADAPTER", help="an adapter, or a weighted mix: a:0.7 b:0.3")
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one named in the adapter folder)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the merged model")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the merged weights (default: auto, that of the base)",
    )
    add_quantize(parser)
    parser.add_argument(
        "--to", choices=QUANTIZED, help="quantize the merged linear layers to this format (default: plain weights)"
    )
    parser.add_argument(
        "--shard-size", default="2GB", metavar="SIZE", help="maximum size of a file, such as 500MB (default: 2GB)"
    )
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="stochastic (bfloat16 only) keeps small changes on average but adds noise (default: nearest)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of stochastic rounding (default: 0)"
    )
    parser.add_argument(
        "--residual",
        type=at_least(0),
        default=0,
        metavar="R",
        help="also write an adapter of rank R that restores the rounding error",
    )
    parser.add_argument(
        "--allow-rounding", action="store_true", help="write the model even if rounding loses most of the change"
    )
    add_device(parser, "device on which the logits are compared")
    add_force(parser)
    parser.add_argument("--no-probe", action="store_true", help="do not run the merged model to compare logits")
    add_sites(parser, "least accurate")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Merge the adapters, write the model and report its accuracy."""
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import notes_on_parents, read_parents
    from veneer.merge.folder import merge_to_folder
    from veneer.models.devices import resolve_device
    from veneer.models.quantized.scheme import scheme_for

    shard_bytes, device = parse_size(args.shard_size), resolve_device(args.device)
    check_free(args.out)
    entries = parse_mix(args.adapter)
    parents = read_parents(entries, force=args.force)
    for remark in notes_on_parents(parents):
        note(remark)
    _, base = checked_base(parents, args.base, args.force, args.quantize, task_of(entries))
    compare = None if args.no_probe else _logit_check(parents, base, device)
    report = status("merging")(merge_to_folder)(
        [(parent.adapter, parent.weight) for parent in parents],
        base,
        args.out,
        dtype=_dtype(args.dtype),
        scheme=None if args.to is None else scheme_for(args.to),
        rounding=args.rounding,
        seed=args.seed,
        shard_bytes=shard_bytes,
        residual=args.residual,
        allow_rounding=args.allow_rounding,
        write_residual=lambda adapter, folder: _write_residual(adapter, folder, str(args.out)),
        check=_finish(parents, base.folder.path, compare),
    )
    if args.json:
        print(as_json(asdict(report)))
    else:
        print_lines(_lines(report, args.sites))
    return 0


def parse_size(text: str, option: str = "--shard-size") -> int:
    """Return the bytes of ``2GB``, ``500MB``, ``4GiB`` or a plain number.

    Raises:
        ConfigError: The text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{option}: expected a size such as 500MB or 2GB, found {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _dtype(name: str):  # type: ignore[no-untyped-def]
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _finish(parents: Sequence[Parent], base: Path, compare: Check | None) -> Check:
    """Return a function that adds the adapters' chat template and stop tokens to the merged folder and then compares logits."""

    from veneer.checkpoints.model_folder import set_end_tokens

    def finish(folder: Path, report: MergeReport) -> None:
        templates = {meta["template"] for parent in parents if (meta := parent.adapter.meta).get("receipt")}
        template = templates.pop() if len(templates) == 1 else None
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            report.notes.append("the chat template is that of the adapter")
        elif templates:
            report.notes.append("the adapters were trained with different chat templates; kept that of the base")
        stops, own = stops_of(parents, base, template)
        if added := {text: token for text, token in stops.items() if token not in own}:
            set_end_tokens(folder, [*own, *added.values()])
            report.notes.append(f"generation also stops at {', '.join(added)}, as in training (generation_config.json)")
        if compare is not None:
            compare(folder, report)

    return finish


def _logit_check(parents: Sequence[Parent], base: Skeleton, device: torch.device) -> Check:
    """Return a function that compares the logits of the merged model with those of the adapted base."""
    from veneer.checkpoints import read_adapter
    from veneer.merge.fidelity import compare_logits, fits_in_memory

    def compare(folder: Path, report: MergeReport) -> None:
        if not fits_in_memory(2 * base.folder.bytes()):
            report.notes.append("logits were not compared: not enough memory to run the model in float32")
            return
        residual = folder / "residual"
        adapter = read_adapter(residual) if residual.is_dir() else None
        mix = [(p.adapter, p.weight) for p in parents]
        found = compare_logits(base, folder, mix, residual=adapter, device=device)
        if found is None:
            report.notes.append("logits were not compared: this model needs more inputs than token ids")
        else:
            report.logits = asdict(found)

    return compare


def _write_residual(adapter: Adapter, folder: Path, base: str) -> None:
    from veneer.checkpoints import write_adapter

    write_adapter(adapter, folder, base_name=base)


def _lines(report: MergeReport, count: int) -> list[str]:
    parents = " + ".join(f"{p['name']} x {p['weight']:g}" for p in report.parents)
    stored = f"data type {report.dtype}" + (f", linear layers in {report.format}" if report.format else "")
    lines = [
        f"merged {parents} into {report.out} ({stored}, {report.rounding} rounding)",
        f"the change has {report.ratio:.3g} times the norm of the adapted weights; {percent(report.kept)} of it is kept, "
        f"and the stored change {difference_from('the exact one', report.error)}",
    ]
    if report.format is not None:
        lines.append(
            f"the stored weights differ from the exact ones by {percent(report.distance)} of their norm, in {report.format}"
        )
    if report.left is not None:
        kept = percent(report.kept_with_residual or 0.0)
        lines.append(
            f"with the adapter in {report.out}/residual, {kept} is kept, and it {difference_from('the exact change', report.left)}"
        )
    if report.error > 1e-4:
        rows = [
            [s.site, f"{s.ratio:.3g}", percent(s.kept), percent(s.error), percent(s.unchanged)]
            for s in nlargest(count, report.sites, key=lambda site: site.error)
        ]
        lines += ["", *table(["least accurate sites", "change/weight", "kept", "error", "unchanged"], rows), ""]
    for group in report.untied:
        lines.append(f"{' and '.join(group)} shared one weight and are now separate (tie_word_embeddings is false)")
    if report.logits is not None:
        found = report.logits
        lines.append(
            f"logits: at most {found['merged']:.2g} from the adapted model (the adapters change them by up to "
            f"{found['change']:.3g}); same top {found['unit']} at {percent(found['same_top'])} of {counted(found['positions'], 'position')}"
        )
        if found["with_residual"] is not None:
            lines.append(f"logits with the residual adapter: at most {found['with_residual']:.2g}")
    end = (
        f"transformers loads it as {report.head}" if report.head else f"a base like any other: veneer chat {report.out}"
    )
    return [*lines, *report.notes, end]
