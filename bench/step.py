"""Benchmark the training step against its peers, in one run and in turn.

    make bench                                                       all cases, in about half an hour
    python -m bench.step uniform ragged --rounds 8                   some cases
    python -m bench.step uniform --who veneer peft floor trl         some contestants (also those that run only when named)
    python -m bench.step --list

Prints a table per case with ratios (median, min, max over rounds), tokens per second and peak memory, and writes JSON and a plot into
``--out``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import report
from bench.bases import folder_of, vocabulary_of
from bench.cases import CASES, Case, Contestant
from bench.contest import compete, spec_of
from bench.rows import steps_of
from bench.workers.veneer import save_first

_STEPS = 24


def main() -> None:
    """Run the selected cases."""
    args = _arguments()
    args.checks = max(3, args.checks)  # the second step compiles; it must not be part of a round
    if args.list:
        for case in CASES.values():
            extra = f"; only if named: {', '.join(one.name for one in case.extra)}" if case.extra else ""
            print(f"{case.name:14} {', '.join(one.name for one in case.contestants)}{extra}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    machine = report.machine(args.threads, _versions(args.peers))
    print(json.dumps(machine))
    found = []
    for name in args.cases or list(CASES):
        found.append(measure(CASES[name], args, machine))
        print(report.table(found[-1]), flush=True)
        (args.out / f"{name}.json").write_text(json.dumps(found[-1], indent=1), encoding="utf-8")
    (args.out / "tables.md").write_text("\n".join(map(report.table, found)), encoding="utf-8")
    report.plot(found, args.out / "step.png")
    print(f"written to {args.out}")


def measure(case: Case, args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Run one case and return its results."""
    if args.who:
        known = {one.name: one for one in (*case.contestants, *case.extra)}
        if not any(name in known for name in args.who):
            raise SystemExit(
                f"--who {' '.join(args.who)}: {case.name} has none of them; choose from {', '.join(known)}"
            )
        case = replace(case, contestants=tuple(known[name] for name in args.who if name in known))
    load = case.workload
    print(f"{case.name}:", flush=True)
    base = folder_of(load.base, args.out)
    steps = steps_of(load, min(_STEPS, args.rounds + args.checks), data=args.data, vocabulary=vocabulary_of(load.base))
    specs = {}
    for one in case.contestants:
        spec = spec_of(one, base=base, adapter=None, steps=steps, threads=args.threads)
        if one.peer and one.method != "full":
            spec["adapter"] = str(_first_adapter(one, spec, load.base, args.out))
        specs[one.name] = args.out / f"{case.name}-{one.name}.spec"
        specs[one.name].write_text(json.dumps(spec), encoding="utf-8")
    pythons = {one.name: args.peers if one.peer else args.python for one in case.contestants}
    results = compete(case, specs, pythons, rounds=args.rounds, checks=args.checks, seconds=args.seconds)
    for path in specs.values():
        path.unlink()
    return report.facts(case, results, steps=steps, checks=args.checks, machine=machine)


def _first_adapter(one: Contestant, spec: dict[str, Any], base: str, out: Path) -> Path:
    """The first adapter of all contestants, written once by Veneer."""
    name = f"{base}-{one.method}-r{one.r}-d{one.dropout:g}-{one.dtype}"
    folder = out / "adapters" / name
    if not (folder / "adapter_config.json").is_file():
        save_first(spec, str(folder))
    return folder


def _versions(peers: Path) -> dict[str, str]:
    """Versions of the peers, from their interpreter."""
    code = (
        "import json; from importlib.metadata import version as v; "
        "print(json.dumps({n: v(n) for n in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate')}))"
    )
    if not peers.is_file():
        raise SystemExit(f"{peers} does not exist; run `make bench`, which creates it, or give --peers")
    done = subprocess.run([str(peers), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--who", nargs="+", help="contestants; the others are compared with the first")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--checks", type=int, default=4, help="steps of each contestant before the rounds, at least 3")
    parser.add_argument("--seconds", type=float, default=600, help="time limit per case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder of JSONL files for the ragged rows")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--python", type=Path, default=Path(".venv/bin/python"), help="interpreter with Veneer")
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter with the peers")
    parser.add_argument("--list", action="store_true", help="list cases and contestants")
    return parser.parse_args()


if __name__ == "__main__":
    main()
