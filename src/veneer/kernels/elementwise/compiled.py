"""Chains of elementwise operations that may run compiled.

A chain is a plain function of tensors, such as a norm's forward. Uncompiled it is exactly that function. Compiled (torch.compile: it
needs a C++ compiler on a CPU), all its passes over memory become one. Compiling takes seconds, and rounds differently in the last
place, so nothing is compiled until `compile_chains(True)` is called, for the whole process: a training run does so at a step of its
own choosing, the same one when it is resumed.

The number of tokens, every tensor's first dimension, changes from step to step and is left open in what is compiled; the other sizes
are fixed. So a chain makes one graph for each set of widths and dtypes, whatever the token counts. What comes out of a graph for the
first time is held against the plain function. Where compiling fails, or gives something else, the plain function goes on, and
`status` says why.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.cpp_library import library

__all__ = ["Chain", "Status", "compile_chains", "compiling", "status"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Status:
    """What runs compiled. on: as asked for. graphs: how many were made. reason: why the plain functions run nevertheless, or empty."""

    on: bool
    graphs: int
    reason: str


class _Switch:
    on = False
    reason = ""


_switch = _Switch()
_chains: list[Chain] = []


def compile_chains(on: bool) -> None:
    """Let chains run compiled from now on, or not. The first use of each chain then compiles it."""
    _switch.on = on
    _switch.reason = ""


def compiling() -> bool:
    """Whether chains run compiled now."""
    return _switch.on and not _switch.reason


def status() -> Status:
    """Whether chains run compiled, and if not, why."""
    return Status(_switch.on, sum(chain.graphs for chain in _chains), _switch.reason)


class Chain:
    """A function of tensors [T, ...] and constants. Constants, and tensors without a dimension T, come last: ``tokens`` tells how many
    arguments have one. ``text``: what is compiled, where the plain function is written for its own speed; it computes the same.
    ``native``: its form in C++, of the library and the arguments, which gives None for inputs that it does not take; where it takes them
    it goes before everything else.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        tokens: int,
        text: Callable[..., Any] | None = None,
        native: Callable[..., Any] | None = None,
    ) -> None:
        self.plain = function
        self._native = native
        self._text = text or function
        self._tokens = tokens
        self._made: dict[tuple[object, ...], Callable[..., Any]] = {}
        _chains.append(self)

    @property
    def graphs(self) -> int:
        """How many graphs have been made."""
        return len(self._made)

    def __call__(self, *args: Any) -> Any:
        if self._native is not None and (kernels := library()) is not None:
            found = self._native(kernels, *args)
            if found is not None:
                return found
        # A dimension of size 0 or 1 cannot be left open.
        if not compiling() or len(args[0]) < 2:
            return self.plain(*args)
        # Whoever calls takes the gradient by hand, and a graph would be made for either kind of input.
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        made = self._made.get(key := _key(args, self._tokens))
        return self._make(key, args) if made is None else made(*args)

    def _make(self, key: tuple[object, ...], args: tuple[Any, ...]) -> Any:
        expected = self.plain(*args)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler's own; what matters is checked below
                made = torch.compile(_twin(self._text, len(self._made)), fullgraph=True)
                for tensor in args[: self._tokens]:
                    torch._dynamo.mark_dynamic(tensor, 0)
                found = made(*args)
        except Exception as error:
            line = str(error).strip().splitlines()
            _switch.reason = f"compiling {self.plain.__name__} failed: {line[0] if line else type(error).__name__}"
            return expected
        if not _alike(found, expected):
            _switch.reason = f"{self.plain.__name__}, compiled, computes something else than the plain function"
            return expected
        self._made[key] = made
        return found


def _key(args: tuple[Any, ...], tokens: int) -> tuple[object, ...]:
    return tuple(
        (arg.dtype, arg.shape[1:] if i < tokens else arg.shape, arg.device, arg.is_inference())
        if isinstance(arg, Tensor)
        else arg
        for i, arg in enumerate(args)
    )


def _twin(function: Any, number: int) -> Callable[..., Any]:
    """The same function with a code object of its own: the compiler counts graphs by code, and gives up at a small number."""
    name = f"{function.__name__}_{number}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _alike(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(_alike(a, b) for a, b in zip(found, expected, strict=True))
    distance = (found.double() - expected.double()).norm()
    return bool(distance <= _TOLERANCE[expected.dtype] * expected.double().norm()) or not bool(
        expected.isfinite().all()
    )
