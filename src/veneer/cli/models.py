"""``veneer models``: list the bases on this machine, with their size and the memory that training an adapter needs at least."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from veneer.cli._output import as_json, table
from veneer.cli._parser import add_json

_HEADER = ("base", "source", "type", "weights", "disk", "in bf16", "fits here")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_json(parser, "print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from veneer.models.local import local_bases
    from veneer.training.process_memory import free

    bases = list(local_bases())
    if args.json:
        print(as_json([asdict(base) for base in bases]))
        return 0
    memory = free()
    rows = [
        (
            base.name,
            base.source,
            base.model_type,
            _millions(base.weights),
            _gigabytes(base.bytes),
            _gigabytes(2 * base.weights) if base.weights else "?",
            "?" if memory is None or not base.weights else "yes" if 2 * base.weights < memory else "no",
        )
        for base in bases
    ]
    print("\n".join(line.rstrip() for line in table(_HEADER, rows)) if rows else "No base is on this machine.")
    print(
        "\nAny Hub id, folder with safetensors or GGUF file is a base too. veneer plan --base NAME --memory 24GB shows what fits."
    )
    return 0


def _millions(count: int) -> str:
    return "?" if not count else f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
