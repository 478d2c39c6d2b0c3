"""``veneer inspect PATH``: show the sites, receipt and unusual values of an adapter, and check it against a base."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import table
from veneer.cli._parser import add_device, add_dtype, add_force, add_json
from veneer.cli._spectra import add_spectra_arguments, run_spectra, spectra_requested
from veneer.cli._targets import adapter_folders, not_an_adapter
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.checkpoints.inspect import OverrideView, SiteView, View

_LISTED = ("version", "seed", "template", "tokenizer", "data", "tensors")
_NOT_SHOWN = ("base", "probes", "format", "options", "kinds", "logits", "own", "experts", "expert_tokens")
_ON_OWN_LINES = ("made_by", "parents", "notes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", metavar="PATH", help="an adapter folder, or a run")
    parser.add_argument(
        "--base", metavar="MODEL", help="check fingerprints and probes against this base, and show ||change|| / ||W||"
    )
    parser.add_argument(
        "--verify", action="store_true", help="run the base: compare logits with merged weights and with the receipt"
    )
    add_dtype(parser)
    add_device(parser)
    parser.add_argument("--sites", action="store_true", help="show every site, not groups of sites")
    add_force(parser)
    add_json(parser)
    add_spectra_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 if logits differ."""
    if args.verify and args.base is None:
        raise ConfigError("--verify runs the base model; give it with --base MODEL")
    folders = adapter_folders(args.path)
    if not folders:
        raise not_an_adapter(args.path)
    if spectra_requested(args):
        return run_spectra(args)
    views = _views(folders, args)
    if args.json:
        found = [asdict(view) for view in views]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(lines(view, every_site=args.sites)) for view in views))
    return int(any(view.logits is not None and not view.logits["ok"] for view in views))


@status("reading the adapter")
def _views(folders: dict[str, Path], args: argparse.Namespace) -> list[View]:
    from veneer.checkpoints import attach, read_adapter
    from veneer.checkpoints.inspect import view

    if args.base is None:
        return [view(read_adapter(folder, force=args.force)) for folder in folders.values()]
    from veneer.checkpoints.logit_check import verify_logits
    from veneer.models.load import load_base

    bank = attach(load_base(args.base, dtype=args.dtype, device=args.device).model)
    found = []
    for name, folder in folders.items():
        one = view(bank.load(folder, name=name, force=args.force), bank)
        one.against = args.base
        one.logits = verify_logits(bank, name) if args.verify else None
        found.append(one)
    return found


def lines(found: View, *, every_site: bool = False) -> list[str]:
    """Format the report for a terminal."""
    size = f"{found.parameters:,} parameters, {found.bytes / 1e6:.1f} MB"
    report = [f"{found.path}: {found.method}, {len(found.sites)} sites, {size}", f"base: {found.base or 'not named'}"]
    report.append("options: " + ", ".join(f"{key}={_brief(value)}" for key, value in found.options.items()))
    report += ["", *_table(found, every_site), ""]
    if found.own:
        report += ["other trained tensors:", *(f"  {_override(one)}" for one in found.own), ""]
    report += _receipt(found)
    for title, texts in (("unusual", found.unusual), ("notes", found.notes)):
        if texts:
            report += ["", f"{title}:", *(f"  - {text}" for text in texts)]
    if found.against is not None:
        report += ["", f"checked against {found.against}: all tensors fit" + _fingerprint(found)]
    if found.logits is not None:
        report += _logits(found.logits)
    return report


def _table(found: View, every_site: bool) -> list[str]:
    groups = {site.name: [site] for site in found.sites} if every_site else found.groups()
    header = ["site" if every_site else "sites", "count", "kind", "in", "out", "rank", "scale", "||change||"]
    magnitudes = any(site.magnitude for site in found.sites)
    header += ["of ||W||"] * any(site.share is not None for site in found.sites) + ["magnitude"] * magnitudes
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


def _override(one: OverrideView) -> str:
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
        return ["receipt: none; Veneer did not write this folder"]
    texts = [f"{key} {_hash(found.receipt[key])}" for key in _LISTED if key in found.receipt]
    records, probes = found.receipt.get("base") or {}, found.receipt.get("probes") or {}
    more = [key for key in found.receipt if key not in (*_LISTED, *_ON_OWN_LINES, *_NOT_SHOWN)]
    texts += [f"{key} {_brief(_hash(found.receipt[key]))}" for key in more if found.receipt[key] is not None]
    return [
        "receipt: " + ", ".join(texts),
        f"  fingerprints of {len(records)} base weights, probes of {len(probes)} sites",
        *_experts(found.receipt),
        *_making(found.receipt),
    ]


def _experts(receipt: dict[str, Any]) -> list[str]:
    """Describe the tokens that experts were trained on."""
    recorded = receipt.get("expert_tokens")
    stacks = recorded if isinstance(recorded, dict) else {}
    counts = {f"{stack}.{e}": n for stack, numbers in stacks.items() for e, n in enumerate(numbers)}
    if not counts:
        return []
    idle = [name for name, count in counts.items() if not count]
    lines = [f"  {len(counts)} experts, trained on {min(counts.values()):,} to {max(counts.values()):,} tokens each"]
    return lines + (
        [f"  no token reached {len(idle)} of them: {', '.join(idle[:4])}{', ...' * bool(idle[4:])}"] if idle else []
    )


def _making(receipt: dict[str, Any]) -> list[str]:
    """Describe the operation and the parents of an adapter that was not trained."""
    lines = []
    if isinstance(made := receipt.get("made_by"), dict):
        more = ", ".join(f"{key} {value}" for key, value in made.items() if key != "operation")
        lines.append(f"  made by {made.get('operation')} ({more})")
    for parent in receipt.get("parents") or ():
        digest = f" (tensors {_hash(parent['tensors'])})" if "tensors" in parent else ""
        lines.append(f"  from {parent.get('name')} x {parent.get('weight')}{digest}")
    return lines + [f"  note: {note}" for note in receipt.get("notes") or ()]


def _hash(value: object) -> object:
    """Shorten a hash to its first digits; return anything else unchanged."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def _fingerprint(found: View) -> str:
    if found.receipt is None or not found.receipt.get("base"):
        return "; the receipt does not say whether it is the base that the adapter was trained on"
    overridden = any('force="base"' in note for note in found.notes)
    return "; it is NOT the base that the adapter was trained on" if overridden else "; fingerprints and probes agree"


def _logits(logits: dict[str, Any]) -> list[str]:
    merged = f"merged weights differ by {logits['merged']:.2g}"
    if logits["dtype"] not in ("float32", "float64"):
        merged += f", because of rounding to {logits['dtype']} (--dtype float32 compares without rounding)"
    lines = [f"logits in {logits['dtype']}: the adapter changes them by up to {logits['moved']:.3g}; {merged}"]
    if logits["recorded"] is not None:
        same, apart = (
            "they equal those in the receipt",
            f"they differ from those in the receipt by {logits['recorded']:.2%}",
        )
        lines.append(f"  {same if logits['recorded'] < 5e-5 else apart}")
    return [*lines, *(f"  WRONG: {text}" for text in logits["says"])]
