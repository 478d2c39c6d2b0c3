"""A trace of requests over adapters: a file with one JSON object a line, in the order of ``at``, the seconds since the beginning.

{"at": 0.00, "load": "sql", "folder": "sql"}          the name stands for DIR/sql from now on; again: it is replaced
{"at": 0.01, "request": "r1", "prompt": "Hello", "model": "sql", "max_tokens": 16}
{"at": 0.01, "request": "r2", "prompt": [5, 9], "adapters": {"sql": 0.7, "style": 0.3}, "temperature": 0.9, "seed": 3}
{"at": 0.05, "cancel": "r1"}
{"at": 0.20, "unload": "sql"}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer._files import decode
from veneer.errors import ConfigError, listed
from veneer.serve.engine.request import Mix

_SHOWN = 10
"""Problems of a file that are shown."""


class TraceStep(BaseModel):
    """One line of a trace: a request, or a change of the adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    request: str | None = None
    load: str | None = None
    unload: str | None = None
    cancel: str | None = None
    folder: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)] | None = None
    model: str = "base"
    adapters: dict[str, float] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> TraceStep:
        kinds = [name for name in ("request", "load", "unload", "cancel") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"expected one of request, load, unload and cancel, found {' and '.join(kinds) or 'none'}")
        allowed = {"request": set(TraceStep.model_fields) - {"load", "unload", "cancel", "folder"}, "load": {"folder"}}
        extra = self.model_fields_set - {"at", kinds[0]} - allowed.get(kinds[0], set())
        if extra:
            raise ValueError(f"{kinds[0]} takes no {sorted(extra)[0]}")
        if self.request is not None and self.prompt is None:
            raise ValueError("a request needs a prompt")
        if self.temperature and self.seed is None:
            raise ValueError("a temperature above 0 needs a seed, or the answer cannot be compared")
        if self.adapters is not None and self.model != "base":
            raise ValueError("give model or adapters")
        return self

    @property
    def mix(self) -> Mix:
        """Adapters and weights of a request."""
        if self.adapters is not None:
            return tuple(self.adapters.items())
        return () if self.model == "base" else ((self.model, 1.0),)


def read_trace(file: Path) -> list[TraceStep]:
    """The steps of a trace.

    Raises:
        ConfigError: every line that is wrong.
    """
    try:
        lines = decode(file.read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the trace {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    steps: list[TraceStep] = []
    problems: list[str] = []
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            step = TraceStep.model_validate_json(line)
        except ValidationError as error:
            problems += [f"line {number}: {_problem(detail)}" for detail in error.errors()[:1]]
            continue
        if steps and step.at < steps[-1].at:
            problems.append(f"line {number}: at: {step.at:g} is before the line above")
        if step.request in names:
            problems.append(f"line {number}: request: {step.request} is named twice")
        if step.cancel is not None and step.cancel not in names:
            problems.append(f"line {number}: cancel: no request above is named {step.cancel}")
        names.update([step.request] if step.request is not None else [])
        steps.append(step)
    if not steps and not problems:
        problems = ["expected at least one line, found none"]
    if problems:
        raise ConfigError(f"{file}: {listed(problems, _SHOWN, '; ')}")
    return steps


def _problem(detail: Any) -> str:
    """One problem of a line, without the members of unions in its place."""
    where = ".".join(str(key) for key in detail["loc"] if str(key) in TraceStep.model_fields)
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{where}: {text}" if where else text
