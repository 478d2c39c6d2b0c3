"""A base whose weights several processes hold in parts, through torch's ``fully_shard``.

    shards = Shards(model, share, first=rank == 0)
    shards.divide(layers)

Each process keeps its part of every weight. A layer's weights are gathered when its forward begins and freed when it ends, and again in
backward; those outside of the layers (embeddings, final norm, head) are gathered once a pass. Values are copied and never summed, so the
numbers of a pass are those of the whole base.

Every pass must gather the same weights in the same order in all processes, whichever adapters it computes: backward goes down to the output
of the embeddings (``embedding_output.py``), also where the lower layers have no adapter, and processes run equal numbers of passes.

Outside a pass a weight is a part (a DTensor). The first process can read whole weights inside `lent`, while the others lend it theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veneer.errors import ProcessError
from veneer.models.devices import device_of

Share = Callable[[Any], Any]
"""The first process's value in every process."""


class Shards:
    """The parts of a model's weights in this process."""

    def __init__(self, model: nn.Module, share: Share, *, first: bool) -> None:
        """``model``: the same in all processes. ``share``: see `Share`. ``first``: this is the process that reads."""
        self.model: Any = model
        self._share = share
        self._first = first
        self._reads = False

    def divide(self, layers: Sequence[nn.Module]) -> None:
        """Keep this process's part of each weight. ``layers`` are gathered one at a time, all else once a pass."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = self.model
        mesh = init_device_mesh(device_of(model).type, (torch.distributed.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # A view among the outputs may not be written over, or its backward would miss weights: FlatRunner never does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # The head is read after the forward, by the loss.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)

    def free(self) -> None:
        """Free what a pass without backward has left gathered."""
        self.model.reshard()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the first process read whole weights inside this context, which all processes enter."""
        if not self._first:
            while (name := self._share(None)) is not None:
                with self._whole(self.model.get_submodule(name)):
                    pass
            yield
            return
        self._reads = True
        try:
            yield
        finally:
            self._reads = False
            self._share(None)

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Have a module's own weights whole inside this context: in the first process, inside `lent`.

        Raises ProcessError elsewhere; the other processes would not answer.
        """
        if not _parts(module):
            yield
            return
        if not self._reads:
            raise ProcessError("a weight of a sharded base was read outside of a pass; use --shard none")
        self._share(next(name for name, other in self.model.named_modules() if other is module))
        with self._whole(module):
            yield

    @contextmanager
    def _whole(self, module: nn.Module) -> Iterator[None]:
        parts = _parts(module)
        module._parameters.update(
            {name: nn.Parameter(part.full_tensor(), requires_grad=False) for name, part in parts.items()}
        )
        try:
            yield
        finally:
            module._parameters.update(parts)


def _parts(module: nn.Module) -> dict[str, Any]:
    """The weights of a module that are parts now."""
    from torch.distributed.tensor import DTensor

    return {name: weight for name, weight in module._parameters.items() if isinstance(weight, DTensor)}
