"""``veneer merge ADAPTER --base MODEL --out DIR``: a plain model with the adapters in it, and how exact it is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli._json import as_json
from veneer.cli._mix import base_of, parse_mix
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.deltas.parents import Parent
    from veneer.merge.folder import MergeReport

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("adapter", nargs="+", metavar="ADAPTER", help="a folder, or a weighted mix: a:0.7 b:0.3")
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the adapter's folder names)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new model's folder")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="numbers of the new weights (default auto: as the base has them)",
    )
    parser.add_argument("--shard-size", default="2GB", metavar="SIZE", help="of each file, such as 500MB (default 2GB)")
    parser.add_argument(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="stochastic keeps small changes on average, at the price of noise (to bfloat16 only)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of stochastic rounding (default 0)")
    parser.add_argument(
        "--residual", type=int, default=0, metavar="R", help="also write an adapter of rank R with what rounding lost"
    )
    parser.add_argument(
        "--allow-rounding", action="store_true", help="write even where rounding loses most of the change"
    )
    parser.add_argument("--force", action="append", default=[], metavar="WHAT", help="override a check, such as base")
    parser.add_argument("--no-probe", action="store_true", help="do not run the model to compare logits")
    parser.add_argument(
        "--sites", type=int, default=5, metavar="N", help="how many of the worst sites to show (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge, and print what it did."""
    if args.residual < 0:
        raise ConfigError("--residual: expected a rank of 1 or more")
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import check_base, read_parents
    from veneer.merge.folder import merge_to_folder

    shard_bytes = parse_size(args.shard_size)
    check_free(args.out)
    parents = read_parents(parse_mix(args.adapter), force=args.force)
    name = base_of(parents, args.base)
    base = skeleton(base_folder(name))
    mix = [(parent.adapter, parent.weight) for parent in parents]
    if "base" not in args.force:
        for adapter, _ in mix:
            check_base(adapter, base.weight_2d, name)
    finish = _finish(parents, _comparison(parents, base.folder.path, base.folder.bytes(), args.no_probe))
    report = merge_to_folder(
        mix,
        base,
        args.out,
        dtype=_dtype(args.dtype),
        rounding=args.rounding,
        seed=args.seed,
        shard_bytes=shard_bytes,
        residual=args.residual,
        allow_rounding=args.allow_rounding,
        write_residual=lambda adapter, folder: _write_residual(adapter, folder, str(args.out)),
        check=finish,
    )
    print(as_json(report.as_dict()) if args.json else "\n".join(_lines(report, args.sites)))
    return 0


def parse_size(text: str) -> int:
    """Bytes of ``2GB``, ``500MB``, ``4GiB`` or a plain number. Raises ConfigError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--shard-size: expected a size such as 500MB or 2GB, found {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _dtype(name: str):  # type: ignore[no-untyped-def]
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _finish(parents: Sequence[Parent], compare):  # type: ignore[no-untyped-def]
    """What looks at the finished folder: gives it the chat template that the adapters were trained with, and compares logits."""

    def finish(folder: Path, report: MergeReport) -> None:
        kept = {meta["template"] for parent in parents if (meta := parent.adapter.meta).get("receipt")}
        if len(kept) == 1 and (template := kept.pop()) is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            report.notes.append("the chat template is the one in the adapter's folder")
        elif len(kept) > 1:
            report.notes.append("the adapters were trained with different chat templates; the base's is kept")
        if compare is not None:
            compare(folder, report)

    return finish


def _comparison(parents: Sequence[Parent], base: Path, stored_bytes: int, skip: bool):  # type: ignore[no-untyped-def]
    """What compares logits on the finished folder, or None where that is not wanted."""
    if skip:
        return None
    from veneer.checkpoints import read_adapter
    from veneer.merge.fidelity import compare_logits, fits_in_memory

    def compare(folder: Path, report: MergeReport) -> None:
        if not fits_in_memory(2 * stored_bytes):
            report.notes.append("logits were not compared: there is not enough memory to run the model in float32")
            return
        residual = folder / "residual"
        adapter = read_adapter(residual) if residual.is_dir() else None
        found = compare_logits(base, folder, [(p.adapter, p.weight) for p in parents], residual=adapter)
        if found is None:
            report.notes.append("logits were not compared: this model does not run on token ids alone")
        else:
            report.logits = found.as_dict()

    return compare


def _write_residual(adapter: Adapter, folder: Path, base: str) -> None:
    from veneer.checkpoints import write_adapter

    write_adapter(adapter, folder, base_name=base)


def _lines(report: MergeReport, count: int) -> list[str]:
    from veneer.cli._table import percent, table

    parents = " + ".join(f"{p['name']} x {p['weight']:g}" for p in report.parents)
    lines = [f"merged {parents} into {report.out} (weights: {report.dtype}, rounding: {report.rounding})"]
    lines.append(
        f"the change is {report.ratio:.3g} of the adapted weights; {percent(report.kept)} of it is kept, "
        f"and what is stored differs from it by {percent(report.error)}"
    )
    if report.left is not None:
        kept = percent(report.kept_with_residual or 0.0)
        lines.append(
            f"with the adapter in {report.out}/residual {kept} is kept and it differs by {percent(report.left)}"
        )
    if report.error > 1e-4:
        rows = [
            [s.site, f"{s.ratio:.3g}", percent(s.kept), percent(s.error), percent(s.unchanged)]
            for s in report.worst(count)
        ]
        lines += ["", *table(["worst sites", "change/weight", "kept", "error", "unchanged"], rows), ""]
    for group in report.untied:
        lines.append(f"{' and '.join(group)} shared one weight and now have one each (tie_word_embeddings is false)")
    if report.logits is not None:
        found = report.logits
        lines.append(
            f"largest logit difference to the adapted model: {found['merged']:.2g} (the adapters change logits by up to "
            f"{found['change']:.3g}); same most likely token at {percent(found['same_top'])} of {found['positions']} positions"
        )
        if found["with_residual"] is not None:
            lines.append(f"with the residual adapter: {found['with_residual']:.2g}")
    return lines + report.notes
