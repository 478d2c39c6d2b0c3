"""The forms of operations on a GPU that are chosen by measurement, once for a run, and kept with it.

    attention        plain (PyTorch's attention, lengths in turn) or varlen (``attention/varlen.py``)
    elementwise      plain or compiled (norms, gated activations and rotations, by ``torch.compile``)
    grouped_tokens   adapters with at most so many tokens each take their low-rank products together
    loss_chunk       bytes of the logits of one chunk of the loss; None follows the memory of the device

Forms differ in the last place, so that a run that resumes must take those that it began with. On a CPU they are not asked: C++ kernels
are chosen there (``cpp_library.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["FEW_TOKENS", "Forms", "forms", "use_forms"]

FEW_TOKENS = 64
"""On a CPU, adapters with at most so many tokens are grouped; above, separate products are as fast."""


@dataclass(frozen=True)
class Forms:
    """The form of each operation. The defaults are the references."""

    attention: str = "plain"
    elementwise: str = "plain"
    grouped_tokens: int = FEW_TOKENS
    loss_chunk: int | None = None


_used = [Forms()]


def forms() -> Forms:
    """The forms in use."""
    return _used[-1]


@contextmanager
def use_forms(chosen: Forms) -> Iterator[None]:
    """Use these forms inside the context, in all threads: backward passes run in threads of their own. So whoever shares a base with others
    does this only while holding it (``training/loop/step.py``)."""
    _used.append(chosen)
    try:
        yield
    finally:
        _used.remove(chosen)
