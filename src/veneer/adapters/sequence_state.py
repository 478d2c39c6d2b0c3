"""A flag of each thread: it runs a batch that has its virtual tokens. Methods that lengthen the sequence ask for it in a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _SequenceState(threading.local):
    """True while this thread runs such a batch."""

    lengthened: bool = False


_state = _SequenceState()


@contextmanager
def lengthened() -> Iterator[None]:
    """In this context, calls of the model are on batches that have their virtual tokens."""
    before, _state.lengthened = _state.lengthened, True
    try:
        yield
    finally:
        _state.lengthened = before


def is_lengthened() -> bool:
    """True inside `lengthened`."""
    return _state.lengthened
