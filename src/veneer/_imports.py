"""Imports of transformers that take less time."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

_HEAVY = {"scipy.optimize": ("linear_sum_assignment",)}
"""Modules that transformers imports for losses of object detection -> the functions that it takes from them."""


@contextlib.contextmanager
def light_imports() -> Iterator[None]:
    """Inside this context, some modules that are not loaded yet stand for themselves, and the garbage collector rests.

    A stand-in's functions import the module when they are called. A module of which anything else is asked is imported at once, as ever.
    An import makes many objects that stay; searching them for garbage takes a third of a second.
    """
    placed = {name: _StandIn(name, functions) for name, functions in _HEAVY.items() if _can_wait(name)}
    sys.modules.update(placed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _can_wait(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is not None


class _StandIn(ModuleType):
    """A module that is imported when it is needed."""

    def __init__(self, name: str, functions: tuple[str, ...]) -> None:
        super().__init__(name)
        for function in functions:
            setattr(self, function, _deferred(name, function))

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # of the import system
            raise AttributeError(attribute)
        return getattr(_imported(self.__name__), attribute)


def _deferred(module: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_imported(module), function)(*args, **kwargs)

    return call


def _imported(name: str) -> ModuleType:
    if isinstance(sys.modules.get(name), _StandIn):
        del sys.modules[name]
    return import_module(name)
