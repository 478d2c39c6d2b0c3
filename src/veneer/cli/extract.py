"""``veneer extract --base B --tuned T --out DIR --rank R``: what fine-tuning changed, as an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._json import as_json
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.compose.extract import Extraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model before fine-tuning")
    parser.add_argument("--tuned", required=True, metavar="MODEL", help="the same model, fully fine-tuned")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new adapter's folder")
    parser.add_argument("--name", metavar="NAME", help="the new adapter's name (default: the folder's)")
    parser.add_argument("--rank", type=int, metavar="R", help="rank at every site")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="or the least rank that keeps this share, site by site"
    )
    parser.add_argument("--method", choices=("lora", "dora"), default="lora", help="form of the adapter (default lora)")
    parser.add_argument(
        "--target-modules",
        default="all-linear",
        metavar="PATTERN,...",
        help="sites, as for training (default all-linear)",
    )
    parser.add_argument("--sites", type=int, default=5, metavar="N", help="how many sites to show (default 5)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, singular values included")


def run(args: argparse.Namespace) -> int:
    """Extract, write, and say how much of the change is in it."""
    if (args.rank is None) == (args.energy is None):
        raise ConfigError("say how much to keep: either --rank R or --energy X")
    if not args.target_modules.strip(","):
        raise ConfigError(
            "--target-modules: expected names of layers, such as q_proj,v_proj, or all-linear; found nothing"
        )
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.model_folder import check_free
    from veneer.compose.extract import extract

    check_free(args.out)
    patterns = [part for part in args.target_modules.split(",") if part]
    found = extract(
        skeleton(base_folder(args.base)),
        skeleton(base_folder(args.tuned)),
        name=args.name or args.out.resolve().name,
        rank=args.rank,
        energy=args.energy,
        method=args.method,
        target_modules=patterns[0] if len(patterns) == 1 else patterns,
    )
    found.made_by["tuned"] = args.tuned
    write_adapter(found.adapter, args.out, base_name=args.base, receipt=found.receipt())
    if args.json:
        print(as_json({**found.as_dict(), "out": str(args.out)}))
    else:
        print("\n".join(_lines(found, str(args.out), args.sites)))
    return 0


def _lines(found: Extraction, out: str, count: int) -> list[str]:
    from veneer.cli._table import percent, table

    adapter, ranks = found.adapter, sorted({site.rank for site in found.sites})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [
        f"a {adapter.method.label} adapter of rank {span} at {len(found.sites)} sites, "
        f"{adapter.num_parameters():,} parameters, in {out}",
        f"it holds {percent(found.kept)} of the change at its sites (share of the square norm)",
    ]
    if found.outside:
        names: Any = list(found.outside)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(
            f"{percent(found.outside_share)} of the whole change lies in tensors that it does not cover: {', '.join(names[:3])}{more}"
        )
    if found.unlike:
        names = found.unlike
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(
            f"one model lacks, or has in another shape: {', '.join(names[:3])}{more}; the adapter says nothing of them"
        )
    least = sorted(found.sites, key=lambda site: site.kept)[:count]
    rows = [[s.site, str(s.rank), f"{s.ratio:.3g}", percent(s.kept), *_ends(s.singular_values)] for s in least]
    header = ["sites that keep least", "rank", "change/weight", "kept", "largest value", "smallest kept"]
    return [*lines, "", *table(header, rows)]


def _ends(values: tuple[float, ...]) -> tuple[str, str]:
    return (f"{values[0]:.3g}", f"{values[-1]:.3g}") if values else ("-", "-")
