"""The part of ``veneer inspect`` that looks inside the change: spectra, overlaps, intruders, pictures and the report.

`add_spectra_arguments` declares the flags, `wants_spectra` says whether one was given, `run_spectra` does what they ask.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._json import as_json
from veneer.cli._mix import base_of, parse_mix
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.adapters import Adapter
    from veneer.analysis.spectra import AdapterSpectra
    from veneer.deltas.delta import Weights
    from veneer.deltas.parents import Parent


def add_spectra_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; the parser has ``path``, ``--base``, ``--force`` and ``--json`` already."""
    group = parser.add_argument_group("inside the change")
    group.add_argument(
        "--spectra", action="store_true", help="singular values, ranks and norms of the change, by layer"
    )
    group.add_argument("--against", metavar="ADAPTER", help="how much it has in common with another adapter")
    group.add_argument("--html", type=Path, metavar="FILE", help="write all of it as one page")
    group.add_argument("--plots", type=Path, metavar="DIR", help="write the pictures as SVG and PNG (needs matplotlib)")
    group.add_argument(
        "--reduce-intruders",
        type=Path,
        metavar="DIR",
        help="write the adapter with its intruder dimensions scaled down",
    )
    group.add_argument("--keep", type=float, default=0.75, metavar="X", help="of an intruder's size (default 0.75)")
    group.add_argument("--top-k", type=int, default=10, metavar="N", help="leading directions looked at (default 10)")
    group.add_argument(
        "--threshold", type=float, default=0.5, metavar="X", help="cosine below which one is an intruder (default 0.5)"
    )


def wants_spectra(args: argparse.Namespace) -> bool:
    """Whether one of these flags was given."""
    return bool(args.spectra or args.against or args.html or args.plots or args.reduce_intruders)


def run_spectra(args: argparse.Namespace) -> int:
    """Look inside the adapter at ``args.path``, and write what was asked for."""
    from veneer.analysis.spectra import adapter_spectra
    from veneer.deltas.parents import read_parents

    words = [args.path] + ([args.against] if args.against else [])
    parents = read_parents([entry for word in words for entry in parse_mix([word])], force=args.force)
    adapter = parents[0].adapter
    weights = _weights(args, [parent.adapter for parent in parents])
    if args.reduce_intruders is not None:
        return _reduce(args, parents[0], weights)
    other = parents[1].adapter if len(parents) > 1 else None
    found = adapter_spectra(adapter, weights, against=other, top_k=args.top_k, threshold=args.threshold)
    written = _write(args, found)
    if args.json:
        print(as_json({**found.as_dict(), "written": written}))
    else:
        print("\n".join([*lines(found), *(f"wrote {name}" for name in written)]))
    return 0


def lines(found: AdapterSpectra) -> list[str]:
    """The figures by kind of layer, as a table."""
    from veneer.analysis.plots import modules_of
    from veneer.analysis.spectra import SAME_SEED
    from veneer.cli._table import table

    header = ["module", "sites", "norm", "largest", "stable rank", "effective rank"]
    based = any(site.ratio is not None for site in found.sites)
    header += ["change/weight", "amplification", "intruders"] if based else []
    header += ["phi read", "(chance)", "phi written", "(chance)", "cosine"] if found.subspaces else []
    rows = []
    for module in modules_of(found.sites):
        own = [site for site in found.sites if site.module == module]
        row = [module, str(len(own)), *(_mean([getattr(site, key) for site in own]) for key in ("norm",))]
        row.append(_short(max((site.singular_values[0] for site in own if site.singular_values), default=0.0)))
        row += [_mean([site.stable_rank for site in own]), _mean([site.effective_rank for site in own])]
        if based:
            row += [_mean([site.ratio for site in own]), _mean([site.amplification for site in own])]
            row.append(str(sum(site.intruders.count for site in own if site.intruders is not None)))
        if found.subspaces:
            pairs = [found.subspaces[site.site] for site in own if site.site in found.subspaces]
            keys = ("whole_in", "chance_in", "whole_out", "chance_out", "cosine")
            row += [_mean([getattr(pair, key) for pair in pairs]) for key in keys]
        rows.append(row)
    made = table(header, rows)
    if found.one_seed:
        made.append(SAME_SEED)
    if found.correlation is not None:
        made.append(
            f"direction and magnitude change over sites correlate by {found.correlation:+.2f} (full fine-tuning: below 0, LoRA: near 1)"
        )
    return made


def _weights(args: argparse.Namespace, adapters: list[Adapter]) -> Weights | None:
    gains = any(adapter.method.needs_base_weights for adapter in adapters)
    if args.base is None and not gains and args.reduce_intruders is None:
        return None
    from veneer.checkpoints.base_files import base_folder, fit, skeleton
    from veneer.deltas.parents import Parent, check_base

    name = base_of([Parent(adapter) for adapter in adapters], args.base)
    base = skeleton(base_folder(name))
    for adapter in adapters:
        fit(adapter, base)
        if "base" not in args.force:
            check_base(adapter, base.weight_2d, name)
    return base.weight_2d


def _reduce(args: argparse.Namespace, parent: Parent, weights: Weights | None) -> int:
    from veneer.analysis.intruders import reduce_intruders
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.model_folder import check_free
    from veneer.deltas.parents import base_name, base_records, origin_of, probes_on, template_of

    assert weights is not None
    adapter = parent.adapter
    out: Path = args.reduce_intruders
    check_free(out)
    name = out.resolve().name
    made = reduce_intruders(adapter, weights, name=name, keep=args.keep, top_k=args.top_k, threshold=args.threshold)
    how = {"operation": "reduce_intruders", "keep": args.keep, "top_k": args.top_k, "threshold": args.threshold}
    probes = probes_on(made.adapter, weights) if made.adapter.method.needs_base_weights else {}
    known = {key: value for key, value in (("base", base_records(adapter)), ("probes", probes)) if value}
    write_adapter(
        made.adapter,
        out,
        base_name=args.base or base_name([adapter]),
        receipt={**origin_of([parent]), "made_by": how, **known},
        template=template_of([parent]),
    )
    total, sites = sum(made.found.values()), sum(map(bool, made.found.values()))
    if args.json:
        print(as_json({"out": str(out), "intruders": made.found, **how}))
    else:
        print(
            f"scaled {total} intruder dimensions at {sites} of {len(made.found)} sites to {args.keep:g} of their size, in {out}"
        )
    return 0


def _write(args: argparse.Namespace, found: AdapterSpectra) -> list[str]:
    written = []
    if args.plots is not None:
        from veneer.analysis.plots import write_plots

        if args.plots.is_file():
            raise ConfigError(f"--plots {args.plots}: this is a file; give a folder")
        written += [str(file) for file in write_plots(found, args.plots)]
    if args.html is not None:
        from veneer.analysis.report import write_html

        write_html(found, args.html)
        written.append(str(args.html))
    return written


def _mean(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    return _short(math.fsum(known) / len(known)) if known else "-"


def _short(value: float) -> str:
    return f"{value:.3g}"
