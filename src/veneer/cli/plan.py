"""``veneer plan ...``: what a run would need, with the same arguments as ``veneer train``; nothing is written."""

from __future__ import annotations

import argparse
import json

from veneer.cli import train
from veneer.config import differences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command: those of ``veneer train``."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, memory in bytes")
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if the run would not fit."""
    options, provenance = train.resolve_source(args)
    if not args.json:
        for difference in differences(options, provenance):
            print(difference)
    from veneer.training.run.decisions import plan

    found, remedies = plan(options)
    if args.json:
        print(json.dumps({**found.as_dict(), "remedies": remedies}, indent=2))
        return int(not found.fits)
    print("\n".join(found.lines()))
    if found.extrapolated:
        print("the largest pass is not sure to fit, so it was not tried: its memory is extrapolated from smaller ones")
    if not found.fits:
        print(
            "it does not fit"
            + (f"; it would with {', or '.join(remedies)}" if remedies else ", whatever single option changes")
        )
    return int(not found.fits)
