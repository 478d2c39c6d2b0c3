"""A base whose weights several processes hold in parts, through torch's ``fully_shard``.

    shards = Shards(share, first=rank == 0)
    shards.divide(layers_of, device, model)

Each process keeps its part of every weight. A layer's weights are gathered when its forward begins and freed when it ends, and again in
backward; those outside of the layers (embeddings, final norm, head) are gathered once a pass. Values are copied and never summed, so the
numbers of a pass are those of the whole base.

Every pass must gather the same weights in the same order in all processes, whichever adapters it computes: backward goes down to the output
of the embeddings (``embedding_output.py``), also where the lower layers have no adapter, and processes run equal numbers of passes.

Outside a pass a weight is a part (a DTensor). While a run is set up, all processes read the same weights in the same order (`in_step`).
Later the first process can read whole weights inside `lent`, while the others lend it theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veneer.errors import ProcessError

Share = Callable[[Any], Any]
"""The first process's value in every process."""
_Parts = list[tuple[nn.Module, str, Any]]


class Shards:
    """The parts of a model's weights in this process."""

    def __init__(self, share: Share, *, first: bool) -> None:
        """``share``: see `Share`. ``first``: this is the process that reads."""
        self.model: Any = None
        self._share = share
        self._first = first
        self._reads = False
        self._in_step = False
        self._last: tuple[nn.Module, list[nn.Parameter]] | None = None
        """The module that was whole last in `in_step`, for the many sites of a stack of experts."""

    def divide(
        self, layers_of: Callable[[nn.Module], Sequence[nn.Module]], device: torch.device, model: nn.Module
    ) -> None:
        """Keep this process's part of each weight, on ``device``.

        layers_of: the layers of a model that are gathered one at a time; all else is gathered once a pass.
        model: the same in all processes, on any device. Its layers go to ``device`` one after the other, so that at most one is whole
        there. On the meta device nothing is there yet, and whoever fills the weights fills the parts.
        """
        from torch.distributed.device_mesh import init_device_mesh

        self.model = model
        layers = layers_of(model)
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in layers:
            _move(layer.modules(), device)
            _fully_shard(layer, mesh, reshard=True)
        inside = {module for layer in layers for module in layer.modules()}
        _move((module for module in model.modules() if module not in inside), device)
        # A view among the outputs may not be written over, or its backward would miss weights: FlatRunner never does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # The head is read after the forward, by the loss.
        _fully_shard(model, mesh, reshard=False)

    def free(self) -> None:
        """Free what a pass without backward has left gathered."""
        self.model.reshard()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Let all processes read whole weights inside this context: the same ones, in the same order."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self._last = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the first process read whole weights inside this context, which all processes enter."""
        if not self._first:
            while (name := self._share(None)) is not None:
                _gathered(_parts(self.model.get_submodule(name)))
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
        """Have the weights of a module, and of those inside it, whole inside this context.

        Raises ProcessError outside of `in_step`, and of `lent` in the first process; the other processes would not answer.
        """
        parts = _parts(module)
        if not parts:
            yield
            return
        if self._in_step:
            if self._last is None or self._last[0] is not module:
                self._last = None
                self._last = module, _gathered(parts)
            weights = self._last[1]
        elif self._reads:
            self._share(next(name for name, other in self.model.named_modules() if other is module))
            weights = _gathered(parts)
        else:
            raise ProcessError("a weight of a sharded base was read outside of a pass; use --shard none")
        with _in_place(parts, weights):
            yield


def _fully_shard(module: nn.Module, mesh: Any, *, reshard: bool) -> None:
    """Shard a module, which torch gives a class of its own; transformers finds what it knows of a model by the name of the class."""
    from torch.distributed.fsdp import fully_shard

    cls = type(module)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    made: Any = type(module)
    made.__name__, made.__qualname__, made.__module__ = cls.__name__, cls.__qualname__, cls.__module__


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move what these modules themselves hold, but for weights that have no memory yet."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else tensor.to(device)

    for module in modules:
        module._apply(moved, recurse=False)


def _parts(module: nn.Module) -> _Parts:
    """The weights in a module that are parts now: (holder, name, part)."""
    from torch.distributed.tensor import DTensor

    return [
        (holder, name, weight)
        for holder in module.modules()
        for name, weight in holder._parameters.items()
        if isinstance(weight, DTensor)
    ]


def _gathered(parts: _Parts) -> list[nn.Parameter]:
    """The whole weight of each part; layers that share a weight go on sharing it."""
    made: dict[int, nn.Parameter] = {}
    for _, _, part in parts:
        if id(part) not in made:
            made[id(part)] = nn.Parameter(part.full_tensor(), requires_grad=False)
    return [made[id(part)] for _, _, part in parts]


@contextmanager
def _in_place(parts: _Parts, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whole weights in the place of parts."""
    for (holder, name, _), weight in zip(parts, weights, strict=True):
        holder._parameters[name] = weight
    try:
        yield
    finally:
        for holder, name, part in parts:
            holder._parameters[name] = part
