"""``veneer inspect PATH``: what an adapter's folder holds, where it comes from, what is unusual, and whether it fits a base."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._spectra import add_spectra_arguments, run_spectra, wants_spectra
from veneer.cli._table import table
from veneer.cli._target import adapter_folders
from veneer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from veneer.checkpoints.inspect import OwnView, SiteView, View

_SHOWN = ("version", "seed", "template", "tokenizer", "data", "tensors")
_OWN_LINES = ("made_by", "parents", "notes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("path", metavar="PATH", help="an adapter's folder, or a run")
    parser.add_argument(
        "--base", metavar="MODEL", help="hold it against this base: fingerprints, probes, shares of ||W||"
    )
    parser.add_argument(
        "--verify", action="store_true", help="also run the base: compare logits with a merge and with the receipt"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="numbers of the base's weights"
    )
    parser.add_argument("--sites", action="store_true", help="show every site, not only groups of one name")
    parser.add_argument(
        "--force", action="append", default=[], metavar="WHAT", help="look in spite of a refusal, such as base"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_spectra_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 where the logits do not agree."""
    if args.verify and args.base is None:
        raise ConfigError("--verify runs a model: give it with --base MODEL")
    folders = adapter_folders(args.path)
    if not folders:
        raise CheckpointError(f"{args.path} is no adapter's folder; expected one with adapter_config.json, or a run")
    if wants_spectra(args):
        return run_spectra(args)
    views = _views(folders, args)
    if args.json:
        found = [one.as_dict() for one in views]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(lines(one, every_site=args.sites)) for one in views))
    return int(any(one.logits is not None and not one.logits["ok"] for one in views))


def _views(folders: dict[str, Path], args: argparse.Namespace) -> list[View]:
    from veneer.checkpoints import attach, read_adapter
    from veneer.checkpoints.inspect import view

    if args.base is None:
        return [view(read_adapter(folder, force=args.force)) for folder in folders.values()]
    from veneer.checkpoints.logit_check import verify_logits
    from veneer.models.load import load_base

    bank = attach(load_base(args.base, dtype=args.dtype).model)
    found = []
    for name, folder in folders.items():
        one = view(bank.load(folder, name=name, force=args.force), bank)
        one.against = args.base
        one.logits = verify_logits(bank, name) if args.verify else None
        found.append(one)
    return found


def lines(found: View, *, every_site: bool = False) -> list[str]:
    """The report for a terminal."""
    size = f"{found.parameters:,} parameters, {found.bytes / 1e6:.1f} MB"
    said = [f"{found.path}: {found.method}, {len(found.sites)} sites, {size}", f"base: {found.base or 'not named'}"]
    said.append("options: " + ", ".join(f"{key}={_brief(value)}" for key, value in found.options.items()))
    said += ["", *_table(found, every_site), ""]
    if found.own:
        said += ["of its own:", *(f"  {_owned(one)}" for one in found.own), ""]
    said += _receipt(found)
    for title, texts in (("unusual", found.unusual), ("notes", found.notes)):
        if texts:
            said += ["", f"{title}:", *(f"  - {text}" for text in texts)]
    if found.against is not None:
        said += ["", f"against {found.against}: every tensor fits" + _fingerprint(found)]
    if found.logits is not None:
        said += _logits(found.logits)
    return said


def _table(found: View, every_site: bool) -> list[str]:
    groups = {site.name: [site] for site in found.sites} if every_site else found.groups()
    header = ["site" if every_site else "sites", "count", "kind", "in", "out", "rank", "scale", "||change||"]
    dora = any(site.magnitude for site in found.sites)
    header += ["of ||W||"] * any(site.share is not None for site in found.sites) + ["magnitude"] * dora
    return table(header, [_row(name, sites, header) for name, sites in groups.items()])


def _row(name: str, sites: list[SiteView], header: list[str]) -> list[str]:
    cells = [
        name,
        str(len(sites)),
        _span(site.kind for site in sites),
        *(_span(getattr(s, key) for s in sites) for key in ("in_", "out", "rank")),
    ]
    cells += [_span(f"{site.scale:.3g}" for site in sites), _numbers([site.norm for site in sites])]
    if "of ||W||" in header:
        shares = [site.share for site in sites if site.share is not None]
        cells.append(f"{min(shares):.2%} - {max(shares):.2%}" if shares else "")
    if "magnitude" in header:
        sizes = [size for site in sites if site.magnitude for size in (site.magnitude[0], site.magnitude[2])]
        cells.append(_numbers(sizes))
    return cells


def _owned(one: OwnView) -> str:
    what = f"rows of {one.tokens} tokens" if one.tokens is not None else one.name
    moved = "" if one.moved is None else f", {one.moved:.2%} from the base's"
    return f"{one.place}: {what}, {' x '.join(map(str, one.shape))}{moved}"


def _span(values: Any) -> str:
    distinct = list(dict.fromkeys(str(value) for value in values))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]}, ..., {distinct[-1]}"


def _numbers(values: list[float]) -> str:
    if not values:
        return ""
    return f"{values[0]:.3g}" if len(values) == 1 else f"{min(values):.3g} - {max(values):.3g}"


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _receipt(found: View) -> list[str]:
    if found.receipt is None:
        return ["receipt: none; the folder was not written by Veneer"]
    said = [f"{key} {_hash(found.receipt[key])}" for key in _SHOWN if key in found.receipt]
    records, probes = found.receipt.get("base") or {}, found.receipt.get("probes") or {}
    more = [
        key
        for key in found.receipt
        if key not in (*_SHOWN, *_OWN_LINES, "base", "probes", "format", "options", "kinds", "logits", "own")
    ]
    said += [f"{key} {_brief(_hash(found.receipt[key]))}" for key in more if found.receipt[key] is not None]
    return [
        "receipt: " + ", ".join(said),
        f"  fingerprints of {len(records)} base weights, probes of {len(probes)} sites",
        *_making(found.receipt),
    ]


def _making(receipt: dict[str, Any]) -> list[str]:
    """What a folder was made from and how, where it was not trained."""
    said = []
    if isinstance(made := receipt.get("made_by"), dict):
        more = ", ".join(f"{key} {value}" for key, value in made.items() if key != "operation")
        said.append(f"  made by {made.get('operation')} ({more})")
    for parent in receipt.get("parents") or ():
        digest = f" (tensors {_hash(parent['tensors'])})" if "tensors" in parent else ""
        said.append(f"  from {parent.get('name')} x {parent.get('weight')}{digest}")
    return said + [f"  note: {note}" for note in receipt.get("notes") or ()]


def _hash(value: object) -> object:
    """The first digits of a hash; anything else as it is."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _fingerprint(found: View) -> str:
    if found.receipt is None or not found.receipt.get("base"):
        return "; whether it is the base that the adapter was made on is not known"
    overridden = any('force="base"' in note for note in found.notes)
    return "; it is NOT the base that the adapter was made on" if overridden else "; fingerprints and probes agree"


def _logits(logits: dict[str, Any]) -> list[str]:
    merged = f"merged weights differ by {logits['merged']:.2g}"
    if logits["dtype"] not in ("float32", "float64"):
        merged += f", being rounded to {logits['dtype']} (--dtype float32 compares without that)"
    said = [f"logits in {logits['dtype']}: the adapter moves them by up to {logits['moved']:.3g}; {merged}"]
    if logits["recorded"] is not None:
        said.append(f"  from those in the receipt they differ by {logits['recorded']:.2%}")
    return [*said, *(f"  WRONG: {text}" for text in logits["says"])]
