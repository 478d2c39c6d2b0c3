"""``veneer extract --base B --tuned T --out DIR --rank R``: extract the change by fine-tuning as an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import as_json, percent, print_lines, table
from veneer.cli._parser import add_device, add_json, add_sites, at_least
from veneer.errors import ConfigError, VeneerError, listed

if TYPE_CHECKING:
    from veneer.compose.extract import Extraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="model before fine-tuning")
    parser.add_argument("--tuned", required=True, metavar="MODEL", help="the same model after full fine-tuning")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the new adapter")
    parser.add_argument("--name", metavar="NAME", help="name of the new adapter (default: the name of its folder)")
    parser.add_argument("--rank", type=at_least(1), metavar="R", help="rank at every site")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="instead of --rank: lowest rank per site that keeps this fraction"
    )
    parser.add_argument("--method", choices=("lora", "dora"), default="lora", help="adapter method (default: lora)")
    parser.add_argument(
        "--target-modules",
        default="all-linear",
        metavar="PATTERN,...",
        help="sites to extract, as in training (default: all-linear)",
    )
    add_sites(parser, "least accurate")
    add_device(parser, "device on which the differences are decomposed")
    add_json(parser, "print the report as JSON, with all singular values")


def run(args: argparse.Namespace) -> int:
    """Write the adapter and report how much of the change it keeps."""
    if (args.rank is None) == (args.energy is None):
        raise ConfigError("give either --rank R or --energy X")
    if not args.target_modules.strip(","):
        raise ConfigError(
            "--target-modules: expected names of layers such as q_proj,v_proj, or all-linear; found nothing"
        )
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.base_files import base_folder, skeleton
    from veneer.checkpoints.model_folder import check_free
    from veneer.compose.extract import extract
    from veneer.models.devices import resolve_device

    device = resolve_device(args.device)
    if device.type == "mps":
        raise ConfigError("--device mps: extracting computes in float64, which Apple's GPU does not have; use cpu")
    check_free(args.out)
    patterns = [part for part in args.target_modules.split(",") if part]
    base, tuned = base_folder(args.base), base_folder(args.tuned)
    found = status("extracting")(extract)(
        skeleton(base),
        skeleton(tuned),
        name=args.name or args.out.resolve().name,
        rank=args.rank,
        energy=args.energy,
        method=args.method,
        target_modules=patterns[0] if len(patterns) == 1 else patterns,
        device=device,
    )
    found.made_by["tuned"] = args.tuned
    entries, template = _conversation(base, tuned)
    write_adapter(
        found.adapter, args.out, base_name=args.base, receipt={**found.receipt(), **entries}, template=template
    )
    if args.json:
        print(as_json({**found.as_dict(), "out": str(args.out)}))
    else:
        print_lines(_lines(found, str(args.out), args.sites))
        if template is not None:
            print("the chat template is that of the tuned model")
    return 0


def _conversation(base: Path, tuned: Path) -> tuple[dict[str, Any], str | None]:
    """Return how the tuned model converses, as entries of a receipt, and its chat template if the base has another.

    Both are empty if one model has no tokenizer, or if their tokens differ: the adapter could not use the template then.
    """
    from veneer.data.chat.render import Renderer
    from veneer.data.chat.stops import stop_ids
    from veneer.data.hashing import template_hash
    from veneer.models.load import end_ids, load_tokenizer

    try:
        ours, theirs = load_tokenizer(base), load_tokenizer(tuned)
        if ours.get_vocab() != theirs.get_vocab():
            return {}, None
        ids, own = stop_ids(Renderer(theirs), end_ids(tuned)), getattr(theirs, "chat_template", None)
    except VeneerError:
        return {}, None
    template = own if isinstance(own, str) and own != getattr(ours, "chat_template", None) else None
    stops = {str(theirs.convert_ids_to_tokens(token)): token for token in ids}
    return {"template_sha256": template_hash(ours, template), "stop_tokens": stops}, template


def _lines(found: Extraction, out: str, count: int) -> list[str]:
    adapter, ranks = found.adapter, sorted({site.rank for site in found.sites})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [
        f"wrote a {adapter.method.label} adapter of rank {span} at {len(found.sites)} sites "
        f"({adapter.num_parameters():,} parameters) to {out}",
        f"it keeps {percent(found.kept)} of the change at these sites (fraction of the squared norm)",
    ]
    if found.outside:
        lines.append(f"not included: {percent(found.outside_share)} of the total change, in {listed(found.outside, 3)}")
    if found.unlike:
        lines.append(f"skipped, because only one model has them or their shapes differ: {listed(found.unlike, 3)}")
    least = sorted(found.sites, key=lambda site: site.kept)[:count]
    rows = [[s.site, str(s.rank), f"{s.ratio:.3g}", percent(s.kept), *_ends(s.singular_values)] for s in least]
    header = ["least accurate sites", "rank", "change/weight", "kept", "largest value", "smallest kept"]
    return [*lines, "", *table(header, rows)]


def _ends(values: tuple[float, ...]) -> tuple[str, str]:
    return (f"{values[0]:.3g}", f"{values[-1]:.3g}") if values else ("-", "-")
