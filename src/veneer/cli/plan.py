"""``veneer plan ...``: estimate memory and time of a run, with the arguments of ``veneer train``; writes nothing.

``veneer plan --base MODEL --memory 24GB`` needs neither weights nor examples.
"""

from __future__ import annotations

import argparse

from veneer._terminal import status
from veneer.cli import train
from veneer.cli._fitting import show_what_fits
from veneer.cli._output import as_json
from veneer.cli._parser import add_json
from veneer.config import given_flags, given_sets
from veneer.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``veneer train`` and ``--json``."""
    add_json(parser, "print the plan as JSON, with memory in bytes")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="show which settings fit into this much memory, such as 24GB, from the base's config.json alone",
    )
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is 1 if the run does not fit into memory."""
    if args.memory:
        return show_what_fits(args)
    if not (args.source or given_flags(args).get("data") or given_sets(args)):
        raise ConfigError(
            "there is nothing to plan: give the rows of a run (veneer plan ROWS.jsonl --base MODEL), or --memory SIZE to see which "
            "settings fit"
        )
    options, provenance = train.resolve_source(args)
    if not args.json:
        train.print_differences(options, provenance)
    with status("loading the base and measuring"):
        from veneer.training.run.decisions import plan

        found, remedies = plan(options)
    if args.json:
        print(as_json({**found.as_dict(), "remedies": remedies}))
        return int(not found.fits)
    print("\n".join(found.lines()))
    if found.extrapolated:
        print("the largest pass might not fit, so it was not run: its memory is extrapolated from smaller passes")
    if not found.fits:
        change = (
            f"it would fit with {', or '.join(remedies)}"
            if remedies
            else "lower r, use --dtype bfloat16, or take a smaller base"
        )
        print(f"the run does not fit into memory; {change}")
    return int(not found.fits)
