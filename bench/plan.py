"""Compare planned memory and time with the actual ones, on every workload of the benchmark.

    python -m bench.plan                       every case
    python -m bench.plan uniform dora --steps 6

Each of Veneer's contestants runs in two fresh processes. One plans its run, as ``veneer train`` and as ``veneer plan`` do, and then
takes the steps: their median time is compared with the plan. The other takes the steps without a plan: its peak memory is
compared with the plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.bases import folder_of, vocabulary_of
from bench.cases import CASES
from bench.contest import spec_of
from bench.rows import steps_of

MEMORY, TIME = 0.10, 0.20
"""Allowed relative errors of the plan."""
_HELD_OUT = 2
_RUN = 200
"""Steps of the planned run, since ``veneer train`` spends a share of its time on planning. Only the first ones are taken."""


def main() -> None:
    """Plan and measure the selected cases. Exits 1 if a plan is inaccurate."""
    args = _arguments()
    if args.child:
        print(json.dumps(_child(json.loads(args.child.read_text(encoding="utf-8")), planned=not args.unplanned)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = []
    print(
        "| workload | planned MB | seen MB | off | planned s | seen s (min to max) | off | as `train` plans |\n|"
        + "---|" * 8
    )
    for name, one, steps in _contestants(args):
        spec = spec_of(
            one, base=folder_of(CASES[name].workload.base, args.out), adapter=None, steps=steps, threads=args.threads
        )
        path = args.out / "plan.spec"
        path.write_text(json.dumps({**spec, "count": args.steps}), encoding="utf-8")
        found.append({"workload": f"{name} {one.name}", **_run(path), "peak": _run(path, "--unplanned")["peak"]})
        path.unlink()
        print(_line(found[-1]), flush=True)
    (args.out / "plan.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    sys.exit(any(not _holds(one) for one in found))


def _contestants(args: argparse.Namespace) -> Any:
    """(case, contestant, rows per step) of Veneer, each setting once."""
    seen = set()
    for name in args.cases or list(CASES):
        load = CASES[name].workload
        steps = steps_of(load, args.steps + _HELD_OUT, data=args.data, vocabulary=vocabulary_of(load.base))
        for one in CASES[name].contestants:
            key = (load, one.dtype, one.method, one.r, one.dropout, one.checkpointing)
            if one.engine == "veneer" and key not in seen:
                seen.add(key)
                yield name, one, steps


def _run(spec: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.plan", "--child", str(spec), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _off(one: dict[str, Any], which: str = "plan") -> tuple[float, float]:
    """Relative errors of a plan in memory and time."""
    seconds = statistics.median(one["seconds"])
    return one[which]["peak"] / one["peak"] - 1, one[which]["seconds_per_step"] / seconds - 1


def _holds(one: dict[str, Any]) -> bool:
    return all(abs(memory) <= MEMORY and abs(time) <= TIME for memory, time in (_off(one), _off(one, "quick")))


def _line(one: dict[str, Any]) -> str:
    (memory, pace), (quick_memory, quick_pace) = _off(one), _off(one, "quick")
    seconds = one["seconds"]
    return (
        f"| {one['workload']} | {one['plan']['peak'] / 1e6:.0f} | {one['peak'] / 1e6:.0f} | {memory:+.1%} | "
        f"{one['plan']['seconds_per_step']:.2f} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
        f"{pace:+.1%} | {quick_memory:+.1%}, {quick_pace:+.1%}{'' if _holds(one) else ' OFF'} |"
    )


def _child(spec: dict[str, Any], *, planned: bool) -> dict[str, Any]:
    """One process: the plans, if requested, and the steps with an evaluation before and after."""
    from contextlib import nullcontext

    import torch

    from bench.workers.veneer import Last, job_of
    from veneer.checkpoints import attach
    from veneer.config import TrainOptions, plain
    from veneer.data.example import Example
    from veneer.models.flat import FlatRunner
    from veneer.models.load import load_base
    from veneer.training import process_memory as memory
    from veneer.training.activation_checkpointing import activation_checkpointing
    from veneer.training.loop.step import Stepper
    from veneer.training.loop.trainer import Trainer
    from veneer.training.planning.plan import Planner

    torch.set_num_threads(spec["threads"])
    base = load_base(spec["base"], dtype=spec["dtype"])
    bank = attach(base.model)
    held = [row for step in spec["steps"][-_HELD_OUT:] for row in step]
    spec["steps"] = spec["steps"][:-_HELD_OUT]
    job = job_of(spec, bank, steps=_RUN)
    job.held_out = [Example(tuple(row["ids"]), tuple(row["weights"]), "held") for row in held]
    stepper = Stepper(FlatRunner(base.model), bank)
    options = TrainOptions(**{**plain(job.options), "activation_checkpointing": spec["checkpointing"]})
    found: dict[str, Any] = {}
    for name, thorough in (("quick", False), ("plan", True)) if planned else ():
        began = time.perf_counter()
        found[name] = (
            Planner(options, stepper, [job], base=base, tokens_per_shared_pass=0, thorough=thorough).make().as_dict()
        )
        found[f"{name}_took"] = time.perf_counter() - began
    listener = Last()
    listener.ended = lambda job: None  # type: ignore[method-assign]
    trainer = Trainer(stepper, [job], listener, tokens_per_pass=options.tokens_per_pass, tokens_per_shared_pass=0)
    seconds = []
    with activation_checkpointing(base.model) if spec["checkpointing"] else nullcontext():
        trainer.mean_loss(job, job.held_out)
        held_out, job.held_out = job.held_out, []
        for _ in range(spec["count"]):
            before = time.perf_counter()
            trainer.round()
            seconds.append(time.perf_counter() - before)
        trainer.mean_loss(job, held_out)
    return {**found, "seconds": seconds, "peak": memory.highest()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder of JSONL files for the ragged rows")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--unplanned", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
