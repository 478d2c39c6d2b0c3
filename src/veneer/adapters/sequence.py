"""Adapters that change the sequence: virtual tokens, keys and values before each segment of a flat batch.

Such an adapter does nothing inside a layer, so a call of the model needs help: the caller lengthens the batch and lets the runner put
the adapter's tensors before the segments. `lengthen` makes it so, and `running` is the context of such a call. Any other call of the
model under the adapter's route is an error, because the adapter would silently do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from veneer.adapters.bank import Bank
from veneer.adapters.runtime.route import Mix
from veneer.adapters.sequence_state import lengthened
from veneer.data.batch import Batch
from veneer.errors import RouteError
from veneer.kernels.attention.prepended import Prepended


class SequenceRunner(Protocol):
    """Runs batches that begin with virtual tokens."""

    def prepending(self, prepended: Prepended | None) -> AbstractContextManager[None]:
        """A context in which ``prepended`` stands before the segments of the batches."""
        ...


@contextmanager
def running(runner: SequenceRunner, before: Prepended | None) -> Iterator[None]:
    """In this context, ``runner`` runs a batch that was lengthened for ``before``; for None an ordinary one."""
    if before is None:
        yield
        return
    with runner.prepending(before), lengthened():
        yield


def tensors_before(bank: Bank, mix: Mix) -> tuple[Tensor | None, Tensor | None]:
    """(rows [n, D], keys and values [n, 2 L, W]) that a mix puts before its segments; None for none.

    Raises RouteError for a mix that has two adapters of one form, or one with another weight than 1.
    """
    found: dict[str, Tensor] = {}
    for name, weight in mix:
        adapter = bank[name]
        form = adapter.method.virtual_tokens
        if form is None:
            continue
        if weight != 1.0 or form in found:
            raise RouteError(
                f'adapter "{name}" puts virtual tokens before the sequence, which cannot be weighted or joined with those of another '
                "adapter; use it once, with the weight 1"
            )
        (tensors,) = adapter.tensors.values()
        (found[form],) = tensors.values()
    return found.get("embeddings"), found.get("key_values")


def lengthen(bank: Bank, batch: Batch, mixes: Sequence[Mix]) -> tuple[Batch, Prepended | None]:
    """The batch with the virtual tokens of its segments' mixes, and what stands there; None where no adapter changes the sequence."""
    distinct = set(mixes)
    if not any(bank[name].method.virtual_tokens for mix in distinct for name, _ in mix):
        return batch, None
    known = {mix: tensors_before(bank, mix) for mix in distinct}
    rows, past = (tuple(known[mix][form] for mix in mixes) for form in (0, 1))
    tokens, shifts = ([0 if each is None else len(each) for each in found] for found in (rows, past))
    longer = batch.prepend(tokens, shifts)
    return longer, Prepended(tuple(longer.offsets.tolist()), rows, past)
