"""Compose two adapters into one and look inside the result.

python examples/many_jobs.py
python examples/compose_inspect.py runs/many_jobs/adapters/sums runs/many_jobs/adapters/upper
"""

from __future__ import annotations

import sys

from veneer.cli.main import main as veneer


def main(one: str, other: str, out: str = "runs/composed") -> None:
    """Write the weighted sum of two adapters, and print its ranks and norms, as the commands of the same names do."""
    veneer(["compose", f"{one}:0.5", f"{other}:0.5", "--out", out])
    veneer(["inspect", out, "--spectra"])


if __name__ == "__main__":
    main(*sys.argv[1:4])
