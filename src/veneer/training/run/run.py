"""A run from its options to its end: ``train(config)``, which is what ``veneer train`` does.

The same call again goes on where the last checkpoint left off, or says that the run is over. What the run was asked for is kept in
its folder, and another request there is an error that names what differs; only jobs may be added to several, and join.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from veneer._files import replace_text
from veneer._version import __version__
from veneer.adapters import Bank
from veneer.checkpoints import attach
from veneer.checkpoints.run_state import Lock
from veneer.config import TrainOptions, plain, resolve, to_yaml
from veneer.errors import CheckpointError, ConfigError, TrainingError
from veneer.models.fast_modules import fuse
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, load_base
from veneer.training.acceleration import Faster, natively, worth_compiling
from veneer.training.activation_checkpointing import recomputed
from veneer.training.loop.halving import Halving
from veneer.training.loop.job import Job, State
from veneer.training.loop.step import Stepper
from veneer.training.loop.trainer import Trainer
from veneer.training.planning.packing import Sharing, choose
from veneer.training.planning.plan import Plan, Planner
from veneer.training.run.checkpointing import Saver
from veneer.training.run.console import Screen
from veneer.training.run.jobs import expand
from veneer.training.run.manifest import Facts, chosen_before, compare, facts_of
from veneer.training.run.parent_adapters import build_on
from veneer.training.run.recorder import Recorder
from veneer.training.run.result import RunResult, result_of
from veneer.training.run.run_folder import CONFIG, FACTS, RunFiles
from veneer.training.run.sanity_checks import FirstSteps
from veneer.training.run.setup import FULL, Material, context_of, gather_all, make_job, receipt_of
from veneer.training.run.trackers import Track, require

# What may differ when a run goes on: it changes no number of the run, or (files, threads) is held against its facts.
_FREE = (
    *("out", "name", "data", "valid", "threads", "save_every", "checkpoint_minutes", "track", "jobs", "sweep"),
    *("plan", "activation_checkpointing"),
)


def train(
    config: TrainOptions | Mapping[str, Any] | str | Path,
    *,
    base: Base | None = None,
    screen: Screen | None = None,
    fresh: bool = False,
    resume_from: str | None = None,
    **overrides: Any,
) -> RunResult:
    """Train what ``config`` says (options, a mapping of them, or a YAML file), or go on with it.

    base: a base in memory, taken instead of loading the one that the options name. screen: where the course is told. fresh: forget
    what is in the run's folder, once nothing can refuse the new run before its first step. resume_from: a checkpoint's name instead of
    the newest; newer ones are removed. overrides: options that win over ``config``.

    Raises ConfigError, DataError, TargetError, BaseModelError before anything is written; CheckpointError where the folder is in
    use, cannot be written or holds another run; TrainingError where the only job fails; KeyboardInterrupt where it was stopped.
    """
    options = _options(config, overrides)
    if fresh and resume_from is not None:
        raise ConfigError(
            f"fresh forgets every checkpoint, and resume_from asks for {resume_from}; choose one of the two"
        )
    if options.track is not None:
        require(options.track)
    screen = screen or Screen()
    out = Path(options.out or Path("runs") / (options.name or "adapter"))
    jobs = expand(options)
    with ExitStack() as stack:
        lock = stack.enter_context(Lock(out))
        begun = (out / CONFIG).is_file()
        stack.callback(lambda: None if begun or (out / CONFIG).exists() else lock.leave_nothing(out / "metrics"))
        if begun and not fresh:
            jobs = _jobs_there(out, jobs)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        loaded = base or load_base(options.base, dtype=options.dtype, revision=options.revision)
        stack.enter_context(natively(options.compile, next(loaded.model.parameters()).device, screen.line))
        limit = context_of(loaded)
        material = gather_all(jobs, loaded, limit)
        bank = attach(loaded.model)
        stack.callback(bank.detach)
        fuse(loaded.model)
        made = [make_job(name, own, loaded, bank, material[name]) for name, own in jobs.items()]
        build_on(made, bank)
        halving = Halving(made) if options.halving else None
        files = RunFiles(out, single=len(jobs) == 1)
        files.prepare()
        run = _Run(options, files, made, material, loaded, bank, screen, halving)
        return run.begin() if fresh else run.go(resume_from)


class _Run:
    """One process's work on a run, with everything in memory and the folder its own."""

    def __init__(
        self,
        options: TrainOptions,
        files: RunFiles,
        jobs: list[Job],
        material: dict[str, Material],
        base: Base,
        bank: Bank,
        screen: Screen,
        halving: Halving | None,
    ) -> None:
        self.options = options
        self.files = files
        self.jobs = jobs
        self.material = material
        self.base = base
        self.bank = bank
        self.screen = screen
        self.halving = halving
        self.fresh = False

    def begin(self) -> RunResult:
        """From the beginning to the end. An earlier run in the folder is forgotten once nothing can refuse this one any more."""
        self.fresh = True
        return self.go(None)

    def go(self, resume_from: str | None) -> RunResult:
        """From the last checkpoint, or from the beginning, to the end."""
        vocabulary = getattr(getattr(self.base.model, "config", None), "vocab_size", None)
        watches = {job.name: FirstSteps(self.bank[job.name], vocabulary, job.steps) for job in self.jobs}
        saver = Saver(self.files, self.bank, self._receipt, base_name=self.options.base)
        rounds = None if self.fresh else saver.restore(self.jobs, resume_from)
        facts = self._facts(rounds)
        recorder = Recorder(self.files, self.jobs, saver, self.screen, rounds=rounds or 0)
        recorder.watches = {
            job.name: watches[job.name] for job in self.jobs if watches[job.name].wants(job.progress.step)
        }
        recorder.halving = self.halving
        if saver.damaged:
            recorder.event("checkpoints_damaged", names=saver.damaged, round=rounds)
            self.screen.line(f"{', '.join(saver.damaged)} of {self.files.out} is damaged; going on from the one before")
        for line in plan_lines(self.jobs, self.material, self.bank, facts, restored=rounds is not None):
            self.screen.line(line)
        for line in Plan.recorded(facts):
            self.screen.line(line)
        if any(not job.over for job in self.jobs):  # paused ones too: somebody may have asked for a change of them
            self._train(recorder, facts)
        missing = recorder.finish()
        result = result_of(self.files, self.jobs)
        if recorder.stopped and any(job.running for job in self.jobs):
            self._tell_stop(recorder)
            raise KeyboardInterrupt
        if missing:
            raise CheckpointError(f"{'; '.join(missing)}; make room and run the same command again, which writes it")
        if len(self.jobs) == 1 and self.jobs[0].state is State.FAILED:
            raise TrainingError(self.jobs[0].reason, self.jobs[0].code) from self.jobs[0].error
        return result

    @cached_property
    def stepper(self) -> Stepper:
        """Runs the jobs' batches."""
        runner = FlatRunner(self.base.model)
        if runner.kind != "flat":
            self.screen.line(f"rows are padded: {runner.reason}")
        return Stepper(runner, self.bank, {job.name: job.route for job in self.jobs if job.route})

    def _choices(self, facts: Facts) -> Facts:
        """What is decided from measurements before the first step; what an earlier start decided holds."""
        before = {} if self.fresh else chosen_before(self.files, facts)
        if before:
            return before
        sharing = choose(self.options, self.stepper, self.jobs)
        found = self._plan(sharing.share) if self.options.plan else None
        planned = {} if found is None else {"plan": found.figures(), "recompute": found.recompute}
        seconds = None if found is None else found.seconds
        compiled = worth_compiling(self.options.compile, seconds, next(self.base.model.parameters()).device)
        return {**sharing.facts(), **planned, "compile": compiled}

    def _plan(self, share: int) -> Plan | None:
        """What the run will need, measured before anything of it is written. Raises MemoryPlanError where that is not there."""
        planner = Planner(self.options, self.stepper, self.jobs, base=self.base, share=share)
        try:
            found = planner.make()
        except Exception as error:  # the run itself tells what is wrong with it, and of which job
            self.screen.line(f"there is no plan: {error}")
            return None
        planner.require(found)
        return found

    def _facts(self, rounds: int | None) -> Facts:
        """What the run depends on: written down before the first step, held against that later."""
        facts = facts_of(self.jobs, self.material, self.base, self.bank)
        known = [job.name for job in self.jobs if rounds is not None and (job.progress.step or job.over)]
        if rounds is not None:
            facts, said = compare(self.files, facts, known)
            if said:
                self.screen.line(
                    f"changed since the run began: {', '.join(said)}; from here on its numbers may differ in the last bits"
                )
        else:
            facts |= self._choices(facts)
        if self.fresh:
            self.files.forget()
        # A job alone takes its name from the folder; written down, it keeps it when the folder is moved.
        named = {"name": self.jobs[0].name} if self.files.single else {}
        replace_text(self.files.out / CONFIG, to_yaml(self.options.model_copy(update=named)))
        if rounds is None or len(known) < len(self.jobs):
            self.files.write_json(FACTS, facts)
        return facts

    def _train(self, recorder: Recorder, facts: Facts) -> None:
        trainer = Trainer(
            self.stepper, self.jobs, recorder, budget=self.options.tokens_per_pass, share=int(facts["share"])
        )
        if self.options.track is not None:
            config = plain(self.options)
            recorder.track = Track.start(self.options.track, self.files.out, config, self.screen.line)
        restore_signals = recorder.listen()
        recorder.event("started", round=recorder.rounds, pid=os.getpid())
        wanted = self.options.activation_checkpointing
        try:
            faster = Faster(bool(facts.get("compile", False)), recorder.rounds, self.screen.line)
            recompute = bool(facts.get("recompute", False)) if wanted == "auto" else wanted
            with recomputed(self.base.model, recompute), faster:
                recorder.faster = faster
                trainer.run()
            recorder.settle()
        finally:
            restore_signals()
            self.screen.clear()
            if recorder.track is not None:
                recorder.track.end()

    def _tell_stop(self, recorder: Recorder) -> None:
        if not recorder.saved:
            raise CheckpointError(
                f"the run stopped and could not be saved; make room, and the same command goes on from the last checkpoint in "
                f"{self.files.checkpoints}"
            )
        step = max(job.progress.step for job in self.jobs)
        self.screen.line(f"saved at step {step}; the same command again goes on from there")

    def _receipt(self, job: Job) -> dict[str, Any]:
        return dict(receipt_of(job, self.material[job.name], __version__))


def _options(config: TrainOptions | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> TrainOptions:
    if isinstance(config, TrainOptions):
        return TrainOptions(**{**plain(config), **overrides}) if overrides else config
    if isinstance(config, (str, Path)):
        return resolve(TrainOptions, config, flags=dict(overrides))[0]
    return TrainOptions(**{**config, **overrides})


def _jobs_there(out: Path, jobs: dict[str, TrainOptions]) -> dict[str, TrainOptions]:
    """The jobs, where they are those of the run in the folder, or these and more.

    Raises ConfigError for a folder that holds another run, naming what differs.
    """
    stored, _ = resolve(TrainOptions, out / CONFIG)
    before = expand(stored, files=False)
    if len(before) == len(jobs) == 1:
        jobs = dict(zip(before, jobs.values(), strict=True))  # a folder that was moved: its job keeps its name
    said: dict[str, None] = {}
    for name, options in before.items():
        if name not in jobs:
            said[f'job "{name}" is there, and is not asked for'] = None
            continue
        there, here = plain(options), plain(jobs[name])
        for key in sorted(key for key in {*there, *here} - {*_FREE} if there.get(key) != here.get(key)):
            said[f"{key}: {there.get(key)!r} there, {here.get(key)!r} now"] = None
    added = [name for name in jobs if name not in before]
    if added and (len(before) == 1 or stored.halving):
        said[f'job "{added[0]}" is asked for, and is not there'] = None
    if said:
        raise ConfigError(
            f"{out} holds a run with other options ({', '.join(said)}); choose another folder with --out, or start over with --fresh"
        )
    return jobs


def plan_lines(
    jobs: list[Job], material: Mapping[str, Material], bank: Bank, facts: Facts, *, restored: bool
) -> list[str]:
    """What is about to happen: what was read, once for all that share it, and a line or two a job."""
    total = sum(parameter.numel() for parameter in bank.model.parameters())
    shared: dict[int, list[str]] = {}
    for job in jobs:
        shared.setdefault(id(material[job.name]), []).append(job.name)
    lines: list[str] = []
    for names in shared.values():
        own = material[names[0]]
        who = "" if len(shared) == 1 else f"{', '.join(names)}: "
        lines += [f"{who}{line}" for line in own.report.stated]
        many = "" if len(own.train) == 1 else "s"
        lines.append(
            f"{who}{len(own.train):,} example{many} ({own.report.trained:,} of {own.report.tokens:,} tokens trained), "
            f"{len(own.held_out):,} held out"
        )
        lines += [f"{who}note: {line}" for line in own.remarks]
    for job in jobs:
        own = material[job.name]
        count = bank[job.name].num_parameters()
        tokens = round(job.steps * job.options.batch_size * own.report.tokens / max(1, own.report.examples))
        what = f"{job.options.method} r={job.options.r} at {len(bank[job.name].tensors)} sites"
        if job.options.method == FULL:
            what = f"{len(bank[job.name].overrides)} layers trained whole"
        lines.append(
            f"{job.name}: {what}, {count:,} trainable parameters "
            f"({100 * count / total:.2f} % of the base), learning rate {job.peak:.2e}; {job.steps:,} steps of "
            f"{job.options.batch_size}, about {tokens:,} tokens"
        )
        if restored:
            lines.append(f"{job.name}: going on at step {job.progress.step} of {job.steps} ({job.state.value})")
    if len(jobs) > 1:
        lines.append(Sharing.recorded(facts).line())
    return lines
