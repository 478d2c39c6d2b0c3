"""A trace replayed on an engine, and each of its answers compared with the same request alone.

Requests, loads, replacements, unloads and cancellations go to the engine at their times, while its thread computes. Then each request that
was accepted is computed alone, under the folders that its names stood for when it came. Both have the same tokens; an answer that was cut
has the first of them. At the end blocks and references are back at zero.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.adapters import Bank
from veneer.errors import AdapterError, ServeError
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import (
    EngineMetrics,
    Finished,
    GenerationRequest,
    Mix,
    RequestStream,
    SamplingParams,
    TextDelta,
)
from veneer.serve.trace import TraceStep

_SECONDS = 600.0
"""Longest time without an event."""
_SHOWN = 10
"""Problems that are shown."""


@dataclass
class ReplayedAnswer:
    """A request of the trace: what it asked for, the folders behind its adapters, and what the engine answered."""

    request: GenerationRequest
    folders: tuple[Path, ...]
    stream: RequestStream
    tokens: list[int] = field(default_factory=list)
    end: Finished | None = None

    def wait(self) -> None:
        """Collect the events up to the last."""
        while self.end is None:
            try:
                event = self.stream.get(timeout=_SECONDS)
            except queue.Empty:
                return
            if isinstance(event, TextDelta):
                self.tokens += event.tokens
            elif isinstance(event, Finished):
                self.end = event


@dataclass
class ReplayReport:
    """The outcome of a replay. ``problems``: a sentence for each answer or count that is not as it should be."""

    counts: Counter[str]
    seconds: float
    metrics: EngineMetrics
    problems: list[str] = field(default_factory=list)


class Replay:
    """Replays a trace on one model.

    Args:
        model, tokenizer, bank: the base and its bank, which has no adapters of its own.
        folder: the folder that the trace's folders are in.
        limits: those of the engine that runs the trace.
    """

    def __init__(self, model: Any, tokenizer: Any, bank: Bank, folder: Path, limits: EngineLimits) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._bank = bank
        self._folder = folder
        self._limits = limits
        self._counts: Counter[str] = Counter()
        self._problems: list[str] = []

    def run(self, steps: list[TraceStep], say: Callable[[str], None] = lambda line: None) -> ReplayReport:
        """Replay the steps and compare every answer."""
        engine = Engine(self._model, self._tokenizer, self._bank, self._limits)
        engine.start()
        begun = time.monotonic()
        try:
            answers = self._play(engine, steps, begun)
            for answer in answers:
                answer.wait()
        finally:
            engine.stop()
        seconds = time.monotonic() - begun
        say(f"{len(answers)} requests in {seconds:.1f} s; computing each of them alone")
        for status in engine.adapters():
            engine.unload_adapter(status.name)
        engine.step()
        metrics = engine.metrics()
        self._check_empty(metrics)
        self._compare(answers)
        return ReplayReport(self._counts, seconds, metrics, self._problems)

    def _play(self, engine: Engine, steps: list[TraceStep], begun: float) -> list[ReplayedAnswer]:
        """Hand the steps to a running engine at their times."""
        stands: dict[str, Path] = {}
        answers: list[ReplayedAnswer] = []
        for step in steps:
            time.sleep(max(0.0, begun + step.at - time.monotonic()))
            if step.load is not None:
                path = self._path(step.folder or step.load)
                self._counts["replaced" if step.load in stands else "loaded"] += 1
                engine.load_adapter(step.load, path)
                stands[step.load] = path
            elif step.unload is not None:
                engine.unload_adapter(step.unload)
                self._counts["unloaded"] += 1
                del stands[step.unload]
            elif step.cancel is not None:
                self._counts["cancelled"] += engine.cancel(step.cancel)
            else:
                self._submit(engine, step, stands, answers)
        return answers

    def _path(self, name: str) -> Path:
        """A folder within the folder of adapters."""
        path = self._folder / name
        if not name or self._folder.resolve() not in path.resolve().parents:
            raise AdapterError(f"the trace names the folder {name!r}, which is not in {self._folder}")
        return path

    def _submit(self, engine: Engine, step: TraceStep, stands: dict[str, Path], answers: list[ReplayedAnswer]) -> None:
        ids = engine.renderer.encoder.plain_ids(step.prompt) if isinstance(step.prompt, str) else step.prompt or []
        sampling = SamplingParams(
            max_tokens=step.max_tokens,
            temperature=step.temperature,
            top_p=step.top_p,
            seed=step.seed,
            ignore_eos=step.ignore_eos,
        )
        request = GenerationRequest(step.request or "", tuple(ids), step.mix, sampling)
        unknown = next((name for name, _ in step.mix if name not in stands), None)
        try:
            stream = engine.submit(request)
        except AdapterError:
            if unknown is None:
                raise
            self._counts["refused"] += 1
            return
        if unknown is not None:
            self._problems.append(f"{request.id}: {unknown} was not loaded, and the request was accepted")
        answers.append(ReplayedAnswer(request, tuple(stands[name] for name, _ in step.mix if name in stands), stream))

    def _check_empty(self, metrics: EngineMetrics) -> None:
        left = {
            "blocks in use": metrics.blocks - metrics.free_blocks,
            "running requests": metrics.running,
            "waiting requests": metrics.waiting,
            "adapters beside the layers": len(self._bank.names),
        }
        self._problems += [f"{count} {what} at the end; expected none" for what, count in left.items() if count]

    def _compare(self, answers: list[ReplayedAnswer]) -> None:
        """Compute each request alone and compare."""
        alone = Engine(self._model, self._tokenizer, self._bank, EngineLimits(context=self._limits.context))
        names: dict[tuple[str, Path], str] = {}
        for answer in answers:
            end, request = answer.end, answer.request
            if end is None or end.reason == "error":
                self._problems.append(f"{request.id}: {'no end' if end is None else end.error}")
                continue
            mix: list[tuple[str, float]] = []
            for (name, weight), folder in zip(request.mix, answer.folders, strict=True):
                key = (name, folder)
                if key not in names:
                    names[key] = f"v{len(names)}"
                    alone.load_adapter(names[key], folder)
                mix.append((names[key], weight))
            expected = _alone(alone, request, tuple(mix))
            whole = end.reason != "cancelled"
            if answer.tokens != (expected if whole else expected[: len(answer.tokens)]):
                at = next(
                    (i for i, (a, b) in enumerate(zip(answer.tokens, expected, strict=False)) if a != b),
                    min(len(answer.tokens), len(expected)),
                )
                self._problems.append(
                    f"{request.id}: differs from the same request alone at token {at} ({_described(request.mix)})"
                )
            else:
                self._counts["equal" if whole else "equal up to the cut"] += 1
        for status in alone.adapters():
            alone.unload_adapter(status.name)
        alone.step()


def _alone(engine: Engine, request: GenerationRequest, mix: Mix) -> list[int]:
    """The tokens of a request that nothing runs beside."""
    found: list[int] = []
    for event in engine.run(GenerationRequest(request.id, request.prompt, mix, request.sampling)):
        if isinstance(event, TextDelta):
            found += event.tokens
        elif isinstance(event, Finished) and event.error is not None:
            raise event.error
    return found


def _described(mix: Mix) -> str:
    return ", ".join(f"{name}:{weight:g}" for name, weight in mix) or "base"


def require(report: ReplayReport) -> None:
    """Raise ServeError with the problems of a replay, if there are any."""
    problems = report.problems
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ServeError(f"{len(problems)} problems of the replay: {'; '.join(problems[:_SHOWN])}{more}")


def summary(report: ReplayReport) -> str:
    """The outcome in a few lines."""
    counts, metrics = report.counts, report.metrics
    tokens = sum(metrics.generated_tokens.values())
    lines = [
        f"{counts['equal']} answers equal the same request alone, {counts['equal up to the cut']} cut ones up to the cut",
        f"{counts['loaded']} loads, {counts['replaced']} replacements, {counts['unloaded']} unloads, {counts['cancelled']} "
        f"cancellations, {counts['refused']} requests for adapters that were not loaded, refused",
        f"{metrics.adapter_evictions} evictions, {metrics.preemptions} preemptions, {metrics.cached_tokens} prompt tokens from the "
        f"cache, {tokens} tokens in {report.seconds:.1f} s",
    ]
    return "\n".join(lines)
