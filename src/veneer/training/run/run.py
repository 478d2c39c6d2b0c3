"""``train(config)``: a run from its options to its results. ``veneer train`` calls it.

The same call resumes from the last checkpoint, or reports that the run is over. The options are stored in the run's folder, and other
options there are an error that names the differences; jobs may be added to a run of several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from veneer._files import replace_text
from veneer.config import TrainOptions, given, plain, resolve, to_yaml
from veneer.data.rows.memory_rows import FOLDER, rows_in, write_rows
from veneer.errors import CheckpointError, ConfigError, ProcessError, TrainingError
from veneer.models.divided.sharding import Shards
from veneer.models.load import Base
from veneer.training.activation_checkpointing import activation_checkpointing
from veneer.training.calibrated_base import base_of_run
from veneer.training.cluster.driver import train_on_cluster
from veneer.training.device_memory import memory_of
from veneer.training.loop.halving import Halving
from veneer.training.loop.job import Job, JobState
from veneer.training.loop.trainer import Listener, Trainer
from veneer.training.loss_plot import write_loss_plot
from veneer.training.parallel.agreement import check_folder, check_same, check_versions
from veneer.training.parallel.processes import Processes, join
from veneer.training.parallel.sequences import check_sequence, split_sequences
from veneer.training.parallel.sharding import check_shard, keep_numbers, lent, shards_of_run
from veneer.training.parallel.shared_listener import SharedListener
from veneer.training.planning.packing import Packing
from veneer.training.planning.plan import TrainingPlan
from veneer.training.run import trackers
from veneer.training.run.console import Console
from veneer.training.run.decisions import decide, stored_forms
from veneer.training.run.jobs import check_steps, expand, go_on, match_stored_run, with_former_defaults
from veneer.training.run.manifest import Manifest, compare, earlier_decisions, manifest_of
from veneer.training.run.parent_adapters import OF_THE_ADAPTER
from veneer.training.run.recorder import Recorder
from veneer.training.run.result import RunResult, result_of
from veneer.training.run.run_folder import CONFIG, MANIFEST, PARTS, RunFolder, locked
from veneer.training.run.sanity_checks import SanityChecks
from veneer.training.run.saver import Saver
from veneer.training.run.setup import Setup, describe, set_up
from veneer.training.samples import Sampler, wants_samples
from veneer.training.shared_base import SharedBase, Watcher


def train(
    config: TrainOptions | Mapping[str, Any] | str | Path | None = None,
    *,
    data: Any = None,
    valid: Any = None,
    base: Base | SharedBase | str | Path | None = None,
    watcher: Watcher | None = None,
    console: Console | None = None,
    screen: Console | None = None,
    fresh: bool = False,
    resume_from: str | None = None,
    **overrides: Any,
) -> RunResult:
    """Train the adapters that the options describe, or resume their training.

        train(data=[{"prompt": "2 + 2?", "completion": "4"}], base="smollm2-135m", r=8, out="runs/sums")
        train("run.yaml", learning_rate=1e-4)

    Args:
        config: options, a mapping of them, or a YAML file.
        data: examples: a path, several, or rows (a list of mappings, a ``datasets.Dataset``, a data frame), which the run's folder keeps.
        valid: held-out examples, likewise.
        base: name of the base model, or a base in memory (``load_base``).
        watcher: follows the run.
        console: prints the progress.
        screen: former name of ``console``.
        fresh: forget an earlier run in the folder, once nothing can refuse the new run before its first step.
        resume_from: name of a checkpoint to resume from in place of the newest. Newer checkpoints are removed.
        overrides: options by name, as flags have them (``r=8, learning_rate=1e-4``); they replace those in ``config``.

    Raises:
        ConfigError, DataError, TargetError, BaseModelError: the run cannot start. Nothing was written.
        CheckpointError: the folder is in use, cannot be written or holds another run.
        TrainingError: the only job failed.
        KeyboardInterrupt: the run was stopped.
    """
    examples = {key: value for key, value in (("data", data), ("valid", valid)) if value is not None}
    rows = {key: found for key, value in examples.items() if (found := rows_in(value, key)) is not None}
    unread = {key: (key,) for key in rows}  # until the folder is known
    options = _options(config, {**overrides, **_base_option(config, base), **examples, **unread})
    with ExitStack() as stack:
        options = _rows_as_files(options, rows, stack)
        loaded = base if isinstance(base, Base | SharedBase) else None
        console = console or screen or Console()
        return _start(options, loaded, console, watcher or Watcher(), fresh=fresh, resume_from=resume_from)


def _start(
    options: TrainOptions,
    base: Base | SharedBase | None,
    console: Console,
    watcher: Watcher,
    *,
    fresh: bool,
    resume_from: str | None,
    whole: Path | None = None,
) -> RunResult:
    """Lock the folder, set the run up and run it. ``whole``: the folder of the run on a cluster of which this is a part."""
    if fresh and resume_from is not None:
        raise ConfigError(
            f"fresh forgets all checkpoints, and resume_from asks for {resume_from}; give only one of them"
        )
    if options.track is not None:
        trackers.require(options.track)
    out = folder_of_run(options)
    if options.cluster is not None:
        _check_cluster(options, base, resume_from)
        return train_on_cluster(options, out, train_part, console, fresh=fresh)
    if not fresh and (out / PARTS).is_dir():
        raise ConfigError(
            f"{out} holds a run on a cluster; resume it with --cluster, or choose another folder with --out"
        )
    with join(options.processes, options.device, options.answer_minutes) as processes, ExitStack() as stack:
        console = console if processes.first else Console(quiet=True)
        goes_on = not fresh and (out / CONFIG).is_file()
        own = with_former_defaults(out, options) if goes_on else options

        def enter() -> dict[str, TrainOptions]:
            jobs = expand(own)
            check_shard(own, jobs.values(), processes, loads=base is None)
            check_sequence(own, jobs.values(), processes, base.base if isinstance(base, SharedBase) else base)
            if processes.first:
                stack.enter_context(locked(out))
            return jobs

        def begin() -> tuple[Setup, RunFolder, Halving | None, Mapping[str, int]]:
            jobs, stored = match_stored_run(out, expanded) if goes_on else (expanded, {})
            if console.live:
                stack.callback(console.clear)  # an error must not stand behind it
                console.progress(f"loading {options.base}")
            held = base_of_run(own, jobs, base, out, console, known=goes_on, alone=processes.alone)
            with nullcontext() if shards is None else shards.in_step():
                setup = stack.enter_context(set_up(own, jobs, held, console.line, shards))
            halving = Halving(setup.jobs) if options.halving else None
            longer = check_steps(out, stored, setup.jobs)
            return setup, RunFolder(out, single=len(jobs) == 1 and whole is None, whole=whole), halving, longer

        check_versions(processes)
        expanded = processes.together(enter)
        check_folder(processes, out)
        processes.sequence = 1 if processes.alone else options.sequence_parallel
        shards = shards_of_run(own, expanded, processes, loads=base is None)
        setup, folder, halving, longer = processes.together(begin) if shards is None else processes.in_step(begin)
        if processes.first:
            folder.prepare()
        return _run(setup, folder, console, halving, longer, watcher, processes, fresh=fresh, resume_from=resume_from)


def _check_cluster(options: TrainOptions, base: Base | SharedBase | None, resume_from: str | None) -> None:
    """Raise ConfigError for arguments that a run on a cluster cannot take."""
    if resume_from is not None:
        raise ConfigError(
            "resume_from names a checkpoint of one process, and each part of a run on a cluster has its own"
        )
    if base is not None:
        raise ConfigError(
            f"cluster: each worker loads the base itself; name it (base={options.base!r}) and pass none in memory"
        )


def train_part(options: TrainOptions, base: Base | None, whole: Path, watcher: Watcher) -> RunResult | None:
    """Train some jobs of a run on a cluster, or go on from their checkpoint; returns None if the part was stopped.

    Args:
        options: the options of the part, as of a run of its own.
        base: the base in memory.
        whole: the folder of the whole run, which takes metrics and adapters.
        watcher: follows the part, and stops it.
    """
    try:
        return _start(options, base, Console(quiet=True), watcher, fresh=False, resume_from=None, whole=whole)
    except KeyboardInterrupt:
        return None


def _run(
    setup: Setup,
    folder: RunFolder,
    console: Console,
    halving: Halving | None,
    longer: Mapping[str, int],
    watcher: Watcher,
    processes: Processes,
    *,
    fresh: bool,
    resume_from: str | None,
) -> RunResult:
    """Restore or begin the jobs, train them to their ends, and return the result.

    ``longer``: jobs that have more steps than when the run last started, with the number that they had.
    """
    options, jobs, bank = setup.options, setup.jobs, setup.bank
    # Of the initial tensors.
    checks = {job.name: SanityChecks(bank[job.name], setup.choices(job), job.steps) for job in jobs}
    saver = Saver(folder, bank, setup.receipt_of, base_name=setup.base.name if options.calibrate else options.base)
    rounds = None if fresh else _restore(saver, jobs, resume_from, processes)
    gone_on = [] if rounds is None else [go_on(job, longer[job.name], folder.out) for job in jobs if job.name in longer]
    shards = setup.shards
    together = processes.together if shards is None else processes.in_step
    manifest = together(lambda: manifest_of(setup, processes.size))
    check_same(processes, {"base weights": manifest["base"], "examples": manifest["data"]})
    manifest = processes.together(
        lambda: _settle_manifest(setup, folder, console, rounds, manifest, fresh=fresh) if processes.first else {}
    )
    manifest = processes.share(manifest)
    unfinished = any(not job.over for job in jobs)
    split_sequences(setup, processes, console.line)
    if shards is not None:
        keep_numbers(setup, shards)
        console.line(f"the base is divided among {processes.size} processes")
    if not processes.first:
        return _follow(setup, folder, checks, manifest, processes, shards, unfinished=unfinished)
    recorder = Recorder(
        folder,
        jobs,
        saver,
        console,
        rounds=rounds or 0,
        checks={job.name: checks[job.name] for job in jobs if checks[job.name].needed(job.progress.step)},
        halving=halving,
        sampler=Sampler(setup.base, bank, sampled) if (sampled := [*filter(wants_samples, jobs)]) else None,
        memory=memory_of(setup.device),
        watcher=watcher,
    )
    watcher.started(jobs)
    _announce(setup, manifest, recorder, gone_on, restored=rounds is not None)
    if unfinished:  # also if all jobs are paused: a request may resume them
        listener = recorder if processes.alone else SharedListener(processes, jobs, bank, {}, recorder, lent(shards))
        trainer = _trainer(setup, listener, manifest, processes)
        with _tracked(options, recorder):
            _train(trainer, recorder, listener, recompute=_recompute(options, manifest))
    result = processes.together(lambda: _result_or_stop(recorder, lent(shards)))
    if result is None:
        raise KeyboardInterrupt
    return result


def _result_or_stop(recorder: Recorder, lent: Callable[[], AbstractContextManager[None]]) -> RunResult | None:
    """The result, or None for a run that was stopped: all processes must get to know."""
    try:
        with lent():
            return _finish(recorder)
    except KeyboardInterrupt:
        return None


def _trainer(setup: Setup, listener: Listener, manifest: Manifest, processes: Processes) -> Trainer:
    setup.stepper.forms = stored_forms(manifest)
    return Trainer(
        setup.stepper,
        setup.jobs,
        listener,
        tokens_per_pass=setup.options.tokens_per_pass,
        tokens_per_shared_pass=Packing.stored(manifest).tokens,
        processes=processes,
    )


def _follow(
    setup: Setup,
    folder: RunFolder,
    checks: Mapping[str, SanityChecks],
    manifest: Manifest,
    processes: Processes,
    shards: Shards | None,
    *,
    unfinished: bool,
) -> RunResult:
    """Train as the first process decides, and write nothing: the part of all other processes."""
    jobs = setup.jobs
    needed = {job.name: checks[job.name] for job in jobs if checks[job.name].needed(job.progress.step)}
    listener = SharedListener(processes, jobs, setup.bank, needed, None, lent(shards))
    if unfinished:
        trainer = _trainer(setup, listener, manifest, processes)
        recompute = _recompute(setup.options, manifest)
        with (
            listener.handle_signals(),
            activation_checkpointing(setup.base.model, recompute),
        ):
            trainer.run()
    with lent(shards)():
        pass
    processes.together(lambda: None)  # until the first one has written what is missing
    if listener.stopped and any(job.running for job in jobs):
        raise SystemExit(130)
    return result_of(folder, jobs)


def _restore(saver: Saver, jobs: list[Job], resume_from: str | None, processes: Processes) -> int | None:
    """Restore the jobs in every process, from one folder that all of them see."""
    rounds = processes.together(lambda: saver.restore(jobs, resume_from) if processes.first else None)
    if processes.alone:
        return rounds
    if not processes.first:
        rounds = saver.restore(jobs, resume_from, writes=False)
    everywhere = processes.gather(rounds)
    apart = next((rank for rank, found in enumerate(everywhere) if found != everywhere[0]), None)
    if apart is not None:
        raise ProcessError(
            f"process {apart} does not see the checkpoint of {saver.folder.out} that process 0 sees; put --out on storage that all "
            "machines share"
        )
    return rounds


def _settle_manifest(
    setup: Setup, folder: RunFolder, console: Console, rounds: int | None, manifest: Manifest, *, fresh: bool
) -> Manifest:
    """Complete and store the manifest of a run that begins, or compare that of a run that resumes."""
    known = [job.name for job in setup.jobs if rounds is not None and (job.progress.step or job.over)]
    if rounds is not None:
        manifest, changes = compare(folder, manifest, known)
        for job in setup.jobs:  # its start is over, so the adapter may have changed or gone on since
            job.built_on |= {"init_from": manifest["init_from"][job.name]} if job.name in manifest["init_from"] else {}
        if changes and any(not job.over for job in setup.jobs):
            console.line(
                f"changed since the run began: {', '.join(changes)}; the last bits of its numbers may differ from here on"
            )
    else:
        manifest |= (not fresh and earlier_decisions(folder, manifest)) or decide(setup, console.line)
    if fresh:
        folder.forget()
    # A single job is named after its folder. The stored name stays when the folder is moved.
    named = {"name": setup.jobs[0].name} if folder.single else {}
    stored = {**plain(setup.options), **named}
    # Options that an adapter determines are left out, as they were by the user.
    if any(job.options.init_from for job in setup.jobs):
        stored = {
            key: value for key, value in stored.items() if key not in OF_THE_ADAPTER or key in given(setup.options)
        }
    replace_text(folder.out / CONFIG, to_yaml(stored))
    if rounds is None or len(known) < len(setup.jobs):
        folder.write_json(MANIFEST, manifest)
    return manifest


def _announce(setup: Setup, manifest: Manifest, recorder: Recorder, gone_on: list[str], *, restored: bool) -> None:
    damaged = recorder.saver.damaged
    if damaged:
        recorder.event("checkpoints_damaged", names=damaged, round=recorder.rounds)
        recorder.console.line(f"{', '.join(damaged)} of {recorder.folder.out} is damaged; resuming from the one before")
    lines = describe(setup, restored=restored)
    if len(setup.jobs) > 1:
        lines.append(Packing.stored(manifest).line())
    left = max((job.steps - job.progress.step for job in setup.jobs if not job.over), default=0)
    for line in (*lines, *gone_on, *(TrainingPlan.stored_lines(manifest, left) if left else ())):
        recorder.console.line(line)


def _train(trainer: Trainer, recorder: Recorder, listener: Recorder | SharedListener, *, recompute: bool) -> None:
    model = trainer.stepper.runner.model
    recorder.event("started", round=recorder.rounds, pid=os.getpid())
    try:
        with listener.handle_signals(), activation_checkpointing(model, recompute):
            trainer.run()
            recorder.save_requests()
    finally:
        recorder.console.clear()
        with suppress(OSError):
            write_loss_plot(recorder.folder.out)


@contextmanager
def _tracked(options: TrainOptions, recorder: Recorder) -> Iterator[None]:
    """Log to the experiment tracker of the options, if there is one, until training ends."""
    if options.track is None:
        yield
        return
    recorder.tracker = trackers.ExperimentTracker(
        options.track, recorder.folder.out, plain(options), recorder.console.line
    )
    try:
        yield
    finally:
        recorder.tracker.end()


def _finish(recorder: Recorder) -> RunResult:
    """The result of a run that ended. Raises the error of one that was stopped, that could not be saved, or whose only job failed."""
    folder, jobs = recorder.folder, recorder.jobs
    missing = recorder.save_missing_adapters()
    if recorder.stopped and any(job.running for job in jobs):
        if not recorder.saved:
            raise CheckpointError(
                f"the run stopped and could not be saved; free some space and run the same command, which resumes from the last "
                f"checkpoint in {folder.checkpoints}"
            )
        step = max(job.progress.step for job in jobs)
        recorder.console.line(f"saved at step {step}; run the same command to resume")
        raise KeyboardInterrupt
    if missing:
        raise CheckpointError(f"{'; '.join(missing)}; free some space and run the same command, which writes it")
    if folder.single and jobs[0].state is JobState.FAILED:
        raise TrainingError(f"{jobs[0].reason}; {recorder.saver.kept(jobs[0])}", jobs[0].code) from jobs[0].error
    return result_of(folder, jobs)


def _recompute(options: TrainOptions, manifest: Manifest) -> bool:
    """True if layers recompute their activations: by the option, or by the plan for "auto"."""
    asked = options.activation_checkpointing
    return bool(manifest.get("recompute", False)) if asked == "auto" else bool(asked)


def folder_of_run(options: TrainOptions) -> Path:
    """The output folder of a run."""
    return Path(options.out or Path("runs") / (options.name or "adapter"))


def _options(
    config: TrainOptions | Mapping[str, Any] | str | Path | None, overrides: Mapping[str, Any]
) -> TrainOptions:
    """The options of all sources."""
    if isinstance(config, str | Path) and Path(config).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{config}: expected options, a mapping of them or a YAML file; give examples as data={str(config)!r}"
        )
    if config is None:
        return TrainOptions(**overrides)
    if isinstance(config, TrainOptions):
        return TrainOptions(**{**given(config), **overrides}) if overrides else config
    if isinstance(config, str | Path):
        return resolve(TrainOptions, config, flags=dict(overrides))[0]
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"train takes options, a mapping of them or a YAML file, found {type(config).__name__}; give rows as data="
        )
    return TrainOptions(**{**config, **overrides})


def _base_option(config: Any, base: Any) -> dict[str, str]:
    """The option ``base`` for what was given as one."""
    if base is None:
        return {}
    if isinstance(base, str | Path):
        return {"base": str(base)}
    base = base.base if isinstance(base, SharedBase) else base
    if not isinstance(base, Base):
        raise ConfigError(
            f"base is the name of a base model, or a base of veneer.load_base; found {type(base).__name__}"
        )
    if isinstance(config, str | Path):
        return {}
    known = given(config) if isinstance(config, TrainOptions) else config if isinstance(config, Mapping) else {}
    return {} if "base" in known else {"base": base.name}


def _rows_as_files(
    options: TrainOptions, rows: Mapping[str, list[Mapping[str, Any]]], stack: ExitStack
) -> TrainOptions:
    """Write rows in memory into the run's folder; if no run begins, the context ends without them."""
    out = folder_of_run(options)
    made = [path for path in (out / FOLDER, out, *out.parents) if rows and not path.exists()]
    files: list[Path] = []

    def leave_nothing() -> None:
        if (out / CONFIG).exists():
            return
        for path in files:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()

    stack.callback(leave_nothing)
    for key, found in rows.items():
        files.append(write_rows(found, out, key))
        options = options.model_copy(update={key: (files[-1],)})
    return options
