"""Spectral analysis in ``veneer inspect``: singular values, overlap with another adapter, intruder dimensions, plots.

`add_spectra_arguments` declares the options, `spectra_requested` tells if one of them is given, `run_spectra` runs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from veneer._terminal import status
from veneer.cli._output import as_json, table
from veneer.cli._parents import checked_base, needs_base_weights, parse_mix
from veneer.cli._parser import at_least
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.analysis.spectra import AdapterSpectra
    from veneer.deltas.delta import Weights
    from veneer.deltas.parents import Parent


def add_spectra_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; the parser has ``path``, ``--base``, ``--force`` and ``--json`` already."""
    group = parser.add_argument_group("spectral analysis")
    group.add_argument(
        "--spectra", action="store_true", help="print singular values, ranks and norms of the change per layer"
    )
    group.add_argument("--against", metavar="ADAPTER", help="measure the overlap with another adapter")
    group.add_argument("--html", type=Path, metavar="FILE", help="write the analysis as an HTML page")
    group.add_argument("--plots", type=Path, metavar="DIR", help="write plots as SVG and PNG (needs matplotlib)")
    group.add_argument(
        "--reduce-intruders",
        type=Path,
        metavar="DIR",
        help="write a copy with its intruder dimensions scaled down",
    )
    group.add_argument("--keep", type=float, default=0.75, metavar="X", help="scale intruders by X (default: 0.75)")
    group.add_argument(
        "--top-k",
        type=at_least(1),
        default=10,
        metavar="N",
        help="number of leading directions to compare (default: 10)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="X",
        help="cosine below which a direction is an intruder (default: 0.5)",
    )


def spectra_requested(args: argparse.Namespace) -> bool:
    """Tell if one of the options is given."""
    return bool(args.spectra or args.against or args.html or args.plots or args.reduce_intruders)


def run_spectra(args: argparse.Namespace) -> int:
    """Analyse the adapter at ``args.path``; print the result and write the requested files."""
    from veneer.analysis.spectra import adapter_spectra
    from veneer.deltas.parents import read_parents

    words = [args.path] + ([args.against] if args.against else [])
    parents = read_parents([entry for word in words for entry in parse_mix([word])], force=args.force)
    adapter = parents[0].adapter
    weights = _weights(args, parents)
    if args.reduce_intruders is not None:
        return _reduce(args, parents[0], weights)
    other = parents[1].adapter if len(parents) > 1 else None
    found = status("computing spectra")(adapter_spectra)(
        adapter,
        weights,
        against=other,
        against_base=bool(args.base or args.spectra or args.html or args.plots),
        top_k=args.top_k,
        threshold=args.threshold,
    )
    written = _write(args, found)
    if args.json:
        print(as_json({**found.as_dict(), "written": written}))
    else:
        print("\n".join([*lines(found), *(f"wrote {name}" for name in written)]))
    return 0


def lines(found: AdapterSpectra) -> list[str]:
    """Format a table of means per module."""
    from veneer.analysis.plots import modules_of
    from veneer.analysis.spectra import SAME_SEED, mean_text, short_text

    header = ["module", "sites", "norm", "largest", "stable rank", "effective rank"]
    based = any(site.ratio is not None for site in found.sites)
    header += ["change/weight", "amplification", "intruders"] if based else []
    header += ["phi read", "(chance)", "phi written", "(chance)", "cosine"] if found.subspaces else []
    rows = []
    for module in modules_of(found.sites):
        sites = [site for site in found.sites if site.module == module]
        row = [module, str(len(sites)), mean_text([site.norm for site in sites])]
        row.append(short_text(max((site.singular_values[0] for site in sites if site.singular_values), default=0.0)))
        row += [mean_text([site.stable_rank for site in sites]), mean_text([site.effective_rank for site in sites])]
        if based:
            row += [mean_text([site.ratio for site in sites]), mean_text([site.amplification for site in sites])]
            row.append(str(sum(site.intruders.count for site in sites if site.intruders is not None)))
        if found.subspaces:
            pairs = [found.subspaces[site.site] for site in sites if site.site in found.subspaces]
            keys = ("whole_in", "chance_in", "whole_out", "chance_out", "cosine")
            row += [mean_text([getattr(pair, key) for pair in pairs]) for key in keys]
        rows.append(row)
    report = table(header, rows)
    if found.one_seed:
        report.append(SAME_SEED)
    if found.correlation is not None:
        report.append(
            f"correlation of direction and magnitude change over sites: {found.correlation:+.2f} "
            "(full fine-tuning: below 0, LoRA: near 1)"
        )
    return report


def _weights(args: argparse.Namespace, parents: list[Parent]) -> Weights | None:
    if args.base is None and not needs_base_weights(parents) and args.reduce_intruders is None:
        return None
    return checked_base(parents, args.base, args.force)[1].weight_2d


def _reduce(args: argparse.Namespace, parent: Parent, weights: Weights | None) -> int:
    from veneer.analysis.intruders import reduce_intruders
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.model_folder import check_free
    from veneer.checkpoints.receipt import base_records
    from veneer.deltas.parents import base_name, origin_of, records_for, template_of

    assert weights is not None
    adapter = parent.adapter
    out: Path = args.reduce_intruders
    check_free(out)
    name = out.resolve().name
    made = reduce_intruders(adapter, weights, name=name, keep=args.keep, top_k=args.top_k, threshold=args.threshold)
    how = {"operation": "reduce_intruders", "keep": args.keep, "top_k": args.top_k, "threshold": args.threshold}
    entries = records_for(made.adapter, base_records(adapter), weights)
    write_adapter(
        made.adapter,
        out,
        base_name=args.base or base_name([adapter]),
        receipt={**origin_of([parent]), "made_by": how, **entries},
        template=template_of([parent]),
    )
    total, sites = sum(made.found.values()), sum(map(bool, made.found.values()))
    if args.json:
        print(as_json({"out": str(out), "intruders": made.found, **how}))
    else:
        print(f"scaled {total} intruder dimensions at {sites} of {len(made.found)} sites by {args.keep:g}; wrote {out}")
    return 0


def _write(args: argparse.Namespace, found: AdapterSpectra) -> list[str]:
    written = []
    if args.plots is not None:
        from veneer.analysis.plots import write_plots

        if args.plots.is_file():
            raise ConfigError(f"--plots {args.plots}: expected a folder, found a file")
        written += [str(file) for file in write_plots(found, args.plots)]
    if args.html is not None:
        from veneer.analysis.report import write_html

        write_html(found, args.html)
        written.append(str(args.html))
    return written
