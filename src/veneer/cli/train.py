"""``veneer train DATA... --base MODEL --out DIR`` or ``veneer train config.yaml``; the same command resumes the run.

Several YAML files are several jobs on one base: ``veneer train sql.yaml style.yaml --out runs/both``.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import counted, status
from veneer.cli._launch import launch, launched
from veneer.cli._output import table
from veneer.config import (
    PER_RUN_OPTIONS,
    Provenance,
    TrainOptions,
    add_flags,
    differences,
    given,
    given_flags,
    given_sets,
    resolve,
)
from veneer.errors import ConfigError, Problems, listed

if TYPE_CHECKING:
    from veneer.training import RunResult
    from veneer.training.run.result import JobResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source", nargs="*", metavar="DATA|CONFIG", help="files of examples, or YAML files of options, one per job"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the run in the folder and start over")
    parser.add_argument(
        "--resume-from", metavar="CHECKPOINT", help="resume from this checkpoint (step-00000100), not the latest one"
    )
    add_flags(parser, TrainOptions)


def run(args: argparse.Namespace) -> int:
    """Train; the exit code is 1 if a job failed."""
    options, provenance = resolve_source(args)
    if options.processes > 1 and not launched():
        return launch(["train", *args.words], options.processes, options.threads)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print_differences(options, provenance)
    with status("loading"):
        from veneer.training import train
    result = train(options, fresh=args.fresh, resume_from=args.resume_from)
    if first:
        _print_result(result, options.task)
    return 1 if any(job.state == "failed" for job in result.jobs.values()) else 0


def print_differences(options: TrainOptions, provenance: Provenance) -> None:
    """Print options that do not have their defaults, except those that were typed in this command."""
    for difference in differences(options, provenance):
        if not difference.source.startswith("--"):
            print(difference)


def _print_result(result: RunResult, task: str) -> None:
    """Print the outcome of each job, and commands to continue with."""
    from veneer.training.run.result import ranked, table_of, write_summary

    done = [job for job in result.jobs.values() if job.state == "finished"]
    if len(result.jobs) > 1:
        done = [job for job in ranked(result) if job in done]
        header, rows = table_of(result)
        print("\n" + "\n".join(line.rstrip() for line in table(header, rows)))
        print(f"wrote {', '.join(str(path) for path in write_summary(result))}")
    for job in result.jobs.values():
        if job.state in ("paused", "failed"):
            print(f"{job.name}: {job.state} after {counted(job.steps, 'step')}")
        if job.unreached:
            print(
                f"{job.name}: no token of the examples was routed to {len(job.unreached)} expert"
                f"{'s' if job.unreached[1:] else ''} ({listed(job.unreached, 3)}), which stay as in the base"
            )
    if done:
        best = done[0]
        target = result.out if len(result.jobs) == 1 else best.better
        print(f"\n{best.name}: {best.state} after {counted(best.steps, 'step')}; {_adapters(best)}")
        print("\n".join(f"  veneer {words}" for words in next_commands(task, str(target), f"{result.out}-merged")))


def next_commands(task: str, target: str, merged: str) -> list[str]:
    """The commands that a user may type after a run."""
    from veneer.models.classifiers.heads import HEADS

    evaluate = f"evaluate {target} --data FILE"
    if task in HEADS:
        return [f"predict FILE --adapter {target} --out OUT.csv", evaluate]
    return [f"chat {target}", evaluate, f"merge {target} --out {merged}"]


def _adapters(job: JobResult) -> str:
    """The adapter that commands take, and the last one if it is another, with their held-out losses."""
    if not math.isfinite(job.best_loss):
        return f"adapter: {job.adapter}"
    base = job.losses[0][1] if job.losses[0][0] == 0 and job.init_from is None else math.inf
    worse = f"; the base alone has {base:.4f}, which is lower" if base < job.best_loss else ""
    if job.better == job.adapter:
        return f"adapter: {job.adapter} (held-out loss {job.final_loss:.4f}){worse}"
    step = next(step for step, loss in job.losses if loss == job.best_loss)
    last = f"{job.final_loss:.4f}" if math.isfinite(job.final_loss) else "not finite"
    return f"best adapter: {job.better} (step {step}, held-out loss {job.best_loss:.4f}); last: {job.adapter} ({last}){worse}"


def resolve_source(args: argparse.Namespace) -> tuple[TrainOptions, Any]:
    """Resolve the options of a run from files of examples or options, ``--set`` and flags.

    Returns:
        The options, and where each of them was given.

    Raises:
        ConfigError: Options are wrong; the message lists every mistake.
    """
    flags = given_flags(args)
    sources = [Path(source) for source in args.source]
    configs = [path for path in sources if path.suffix in (".yaml", ".yml")]
    if configs and len(configs) < len(sources):
        other = next(path for path in sources if path not in configs)
        raise ConfigError(
            f"{configs[0]} is a file of options and {other} is not; name the examples in the file of options (data: ...)"
        )
    if len(configs) > 1:
        return _several_files(configs, given_sets(args), flags)
    if configs:
        return _with_sweep_source(*resolve(TrainOptions, configs[0], given_sets(args), flags))
    if sources and "data" in flags:
        raise ConfigError("the examples are given twice, as arguments and with --data; give them once")
    if sources:
        flags["data"] = tuple(str(path) for path in sources)
    return _with_sweep_source(*resolve(TrainOptions, None, given_sets(args), flags))


def _with_sweep_source(options: TrainOptions, provenance: Provenance) -> tuple[TrainOptions, Provenance]:
    """Record where swept lists were given: as values of other options, before they moved into ``sweep``."""
    sources = dict.fromkeys(provenance[key] for key in options.sweep if key in provenance)
    if sources and "sweep" not in provenance:
        provenance = {**provenance, "sweep": " and ".join(sources)}
    return options, provenance


def _several_files(configs: list[Path], sets: list[str], flags: dict[str, Any]) -> tuple[TrainOptions, Provenance]:
    """Resolve one run from several files, one job per file; options of the run must agree in all files."""
    found = {path: resolve(TrainOptions, path, sets, flags)[0] for path in configs}
    problems, first = Problems(), configs[0]
    for path, options in found.items():
        if options.jobs or options.sweep:
            problems.add(f"{path} already defines several jobs; pass it alone, or define one job per file")
        for key in PER_RUN_OPTIONS:
            one, other = getattr(found[first], key), getattr(options, key)
            if one != other and key not in ("jobs", "sweep"):
                problems.add(f"{key} is {one} in {first} and {other} in {path}; jobs share it: set it with a flag")
    if found[first].out is None:
        problems.add("several files make one run; give its folder with --out")
    problems.raise_if_any(ConfigError, "the files cannot be combined into one run")
    common = {key: getattr(found[first], key) for key in PER_RUN_OPTIONS}
    jobs = []
    for path, options in found.items():
        own = {key: value for key, value in given(options).items() if key not in PER_RUN_OPTIONS}
        jobs.append({**own, "name": options.name or path.stem})
    return TrainOptions(**{**common, "jobs": jobs}), {"jobs": ", ".join(map(str, configs))}
