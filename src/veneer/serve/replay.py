"""A trace replayed on an engine, and each of its answers compared with the same request alone.

Requests, loads, replacements, unloads and cancellations go to the engine at their times, while its thread computes. Then each request that
was accepted is computed alone, under the folders that its names stood for when it came. Both have the same tokens; an answer that was cut
has the first of them. At the end blocks and references are back at zero.

Sums in another order round differently, so a draw that rounding decides may end otherwise. Such an answer is equal up to a tie if the
logits of the request alone give its token too once they are moved within rounding; what follows is then another text. Any other difference
is a problem.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from veneer.adapters import Bank
from veneer.errors import AdapterError, ServeError, listed
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import (
    EngineMetrics,
    Finished,
    GenerationRequest,
    Mix,
    RequestStream,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)
from veneer.serve.engine.sampler import choose
from veneer.serve.engine.sequence import Sequence
from veneer.serve.engine.text import StopStrings
from veneer.serve.trace import TraceStep

_SECONDS = 600.0
"""Longest time without an event."""
_SHOWN = 10
"""Problems that are shown."""
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest difference that rounding makes between logits of one text, as a part of the largest logit; of other dtypes 0.02."""
_DRAWS = 256
"""Times that logits are moved to find the tokens that rounding may decide between."""


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
                self.tokens += _last(event)


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
            self._judge(answer, alone, replace(request, mix=tuple(mix)))
        for status in alone.adapters():
            alone.unload_adapter(status.name)
        alone.step()

    def _judge(self, answer: ReplayedAnswer, engine: Engine, request: GenerationRequest) -> None:
        """Compare an answer with the same request alone."""
        found = answer.tokens
        whole = answer.end is not None and answer.end.reason != "cancelled"
        expected = [one.token for one in _alone(engine, request)]
        expected = expected if whole else expected[: len(found)]
        if found == expected:
            self._counts["equal" if whole else "equal up to the cut"] += 1
            return
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        if at is not None and found[at] in _near_draws(engine, request, at):
            self._counts["equal up to a tie"] += 1
            return
        where = min(len(found), len(expected)) if at is None else at
        self._problems.append(
            f"{request.id}: differs from the same request alone at token {where} ({_described(answer.request.mix)})"
        )


def _alone(engine: Engine, request: GenerationRequest, *, top: int = 0) -> list[TokenLogprob]:
    """The tokens of a request that nothing runs beside, and the ``top`` most likely ones at each place."""
    found: list[TokenLogprob] = []
    for event in engine.run(replace(request, sampling=replace(request.sampling, logprobs=top))):
        if isinstance(event, TextDelta):
            found += event.logprobs
        elif isinstance(event, Finished):
            if event.error is not None:
                raise event.error
            found += [event.logprob] if event.logprob is not None else []
    return found


def _last(end: Finished) -> list[int]:
    """The token that ended an answer, if one did."""
    return [end.stopped_by] if isinstance(end.stopped_by, int) else []


def _near_draws(engine: Engine, request: GenerationRequest, at: int) -> set[int]:
    """The tokens that a request alone may draw at a place when its logits move within rounding."""
    most = min(engine.vocabulary, 1000)
    answer = _alone(engine, request, top=most)
    top = answer[at].top
    logits_V = torch.full((engine.vocabulary,), float("-inf"))
    logits_V[[token for token, _ in top]] = torch.tensor([logprob for _, logprob in top])
    size = float(logits_V[torch.isfinite(logits_V)].abs().max())
    dtype = next(engine.model.parameters()).dtype
    noise = torch.randn(_DRAWS, engine.vocabulary, generator=torch.Generator().manual_seed(0))
    moved = logits_V + noise * (size * _ROUNDING.get(dtype, 0.02))
    sequence = Sequence(
        request, request.mix, (), b"", len(request.prompt) + at + 1, lambda _: None, None, StopStrings(())
    )
    sequence.tokens += [one.token for one in answer[:at]]
    return {one.token for one in choose([sequence] * _DRAWS, range(_DRAWS), moved)}


def _described(mix: Mix) -> str:
    return ", ".join(f"{name}:{weight:g}" for name, weight in mix) or "base"


def require(report: ReplayReport) -> None:
    """Raise ServeError with the problems of a replay, if there are any."""
    problems = report.problems
    if problems:
        raise ServeError(f"{len(problems)} problems of the replay: {listed(problems, _SHOWN, '; ')}")


def summary(report: ReplayReport) -> str:
    """The outcome in a few lines."""
    counts, metrics = report.counts, report.metrics
    tokens = sum(metrics.generated_tokens.values())
    lines = [
        f"{counts['equal']} answers equal the same request alone, {counts['equal up to the cut']} cut ones up to the cut, "
        f"{counts['equal up to a tie']} up to a draw that rounding decides",
        f"{counts['loaded']} loads, {counts['replaced']} replacements, {counts['unloaded']} unloads, {counts['cancelled']} "
        f"cancellations, {counts['refused']} requests for adapters that were not loaded, refused",
        f"{metrics.adapter_evictions} evictions, {metrics.preemptions} preemptions, {metrics.cached_tokens} prompt tokens from the "
        f"cache, {tokens} tokens in {report.seconds:.1f} s",
    ]
    return "\n".join(lines)
