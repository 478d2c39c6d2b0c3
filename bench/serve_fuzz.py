"""Requests made from the server's own description: python -m bench.serve_fuzz --schemathesis PROGRAM [--cases 5000] [--seed 0]

PROGRAM is ``schemathesis`` (``pip install schemathesis==4.32.5``, in an environment of its own). A server of a tiny base with two adapters
answers; a status of 500 or more, a connection that is cut, and requests that are left in the engine are failures. Exits 1 then.
5,000 cases take about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tests.serve.api.made import ADMIN_KEY, Running, wait, write_adapters
from tests.training.made import write_place

from veneer.adapters import DoRA, LoRA

_SHARE = 0.7
"""Part of the cases that the phase of random ones makes, about; the rest covers each keyword of the description."""


def fuzz(running: Running, program: str, cases: int, seed: int, folder: str) -> tuple[int, str]:
    """(number of cases, the program's report). ``folder`` takes its caches."""
    with running.http(ADMIN_KEY) as http:
        paths = http.get("/openapi.json").json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    command = [program, "run", f"{running.root}/openapi.json", "-H", f"Authorization: Bearer {ADMIN_KEY}"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--continue-on-failure"]
    command += ["--max-examples", str(max(1, round(_SHARE * cases / operations))), "--seed", str(seed)]
    command += ["--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    report = done.stdout + done.stderr
    made = re.search(r"([\d,]+) generated", report)
    count = int(made.group(1).replace(",", "")) if made else 0
    return count, report if done.returncode or not count else ""


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", default="schemathesis", metavar="PROGRAM")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = write_place(Path(folder))
        write_adapters(place / "base", place / "adapters", {"sql": LoRA(r=2), "style": DoRA(r=2)})
        running = Running(place / "base", place / "state", place / "adapters")
        count, report = fuzz(running, args.schemathesis, args.cases, args.seed, folder)
        wait(running.idle, 60)
        metrics = running.engine.metrics()
        print(report)
        print(json.dumps({"cases": count, "failed": bool(report), "blocks": metrics.blocks - metrics.free_blocks}))
        running.close()
    sys.exit(bool(report) or metrics.blocks != metrics.free_blocks)


if __name__ == "__main__":
    main()
