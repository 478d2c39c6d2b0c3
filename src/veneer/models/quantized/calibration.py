"""Quantizing the linear layers of a model in memory with regard to their inputs on given texts.

The texts go through the model once as it is, for the arguments of its blocks. Then one block after the other is called twice: with its
plain weights, for the second moments of its layers' inputs, and with its quantized ones, for the input of the next block. So each layer is
fitted to the inputs that the quantized model gives it. Beside the model, this holds the hidden states of all texts and the moments of
one block.

Layers outside the list of blocks, and layers that no token reached, are rounded to the nearest values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import BaseModelError
from veneer.kernels.quantized.calibrated import quantize_calibrated
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize
from veneer.models.flat import FlatRunner
from veneer.models.layout import FlatLike, PreparedBatch
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.scheme import Scheme

__all__ = ["quantize_in_place"]


@torch.no_grad()
def quantize_in_place(
    runner: FlatRunner,
    texts: Sequence[FlatLike],
    scheme: Scheme,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Replace the linear layers of a runner's model by quantized ones.

    Args:
        runner: of a model with plain weights.
        texts: batches of the calibration texts.
        scheme: the format.
        progress: is called with the number of blocks that are done and the number of all.

    Returns:
        The layers that were rounded to the nearest values.

    Raises:
        BaseModelError: the model has no list of blocks that follow one another.
    """
    model, names = runner.model, quantized_names(runner.model, scheme.skip)
    blocks = _blocks(model, names)
    batches = [runner.prepare(text) for text in texts]
    states = _arguments(runner, batches, blocks)
    plain = [name for name in names if not name.startswith(tuple(f"{block}." for block in blocks))]
    for done, (path, block) in enumerate(blocks.items()):
        layers = {name: model.get_submodule(name) for name in names if name.startswith(f"{path}.")}
        moments = _Moments()
        with moments.of(layers):
            _call(runner, block, done, batches, states, moments)
        for name, layer in layers.items():
            moments_KK = moments.take(name)
            plain += [name] if moments_KK is None else []
            _replace(model, name, layer, moments_KK, scheme)
        if done + 1 < len(blocks):
            for each, hidden in zip(states, _call(runner, block, done, batches, states), strict=True):
                each.hidden = hidden
        if progress is not None:
            progress(done + 1, len(blocks))
    for name in plain:
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantizedLinear):
            _replace(model, name, layer, None, scheme)
    return plain


@dataclass
class _States:
    """The input of the block that is next, for one batch, and the other arguments of every block."""

    hidden: Tensor
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Moments:
    """Second moments of the inputs of layers; layers that read the same tensor share theirs."""

    def __init__(self) -> None:
        self.cells: Tensor | None = None
        """The rows of inputs that are tokens."""
        self._sums: dict[str, Tensor] = {}
        self._source: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    @contextmanager
    def of(self, layers: dict[str, Any]) -> Iterator[None]:
        """A context in which the inputs of these layers are counted."""
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_pre_hook(self._hook(name)).remove)
            yield
        self._last = None

    def take(self, name: str) -> Tensor | None:
        """The moments [K, K] of a layer's inputs, or None if no token reached it."""
        return self._sums.get(self._source.get(name, name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if self._last is not None and self._last[1] is x and self._source.get(name, self._last[0]) == self._last[0]:
                self._source[name] = self._last[0]
                return
            self._source.setdefault(name, name)
            self._last = (self._source[name], x)
            rows = x.flatten(0, -2)
            if self.cells is not None and len(self.cells) < len(rows):
                rows = rows[self.cells.to(rows.device)]
            rows = rows.float()
            known = self._sums.get(self._source[name])
            self._sums[self._source[name]] = rows.T @ rows if known is None else known.addmm_(rows.T, rows)

        return add


def _blocks(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The blocks of the list that holds most of the layers, by name."""
    found: dict[str, nn.Module] = {}
    most = 0
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(module.modules())
            count = sum(each.startswith(f"{name}.") for each in names)
            if count > most:
                found, most = {f"{name}.{index}": block for index, block in enumerate(module)}, count
    if not found:
        raise BaseModelError(
            f"{type(model).__name__} has no list of blocks, whose layers could be calibrated one after the other; quantize it without rows"
        )
    return found


def _arguments(runner: FlatRunner, batches: Sequence[PreparedBatch], blocks: dict[str, nn.Module]) -> list[_States]:
    """What the blocks are called with on each batch.

    Raises BaseModelError for blocks whose input is not the output of the one before.
    """
    found: list[_States] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        if not outputs:
            found.append(_States(hidden))
        elif outputs[-1] is not hidden:
            raise BaseModelError(
                f"the blocks of {type(runner.model).__name__} are not called one with the output of the other, so they cannot be "
                "calibrated; quantize it without rows"
            )
        rest = {key: value for key, value in named.items() if key != "hidden_states"}
        found[-1].others.append((args[1:], rest))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(_hidden(output))

    with ExitStack() as stack:
        for block in blocks.values():
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        for batch in batches:
            outputs.clear()
            runner.hidden(batch)
    return found


def _call(
    runner: FlatRunner,
    block: nn.Module,
    number: int,
    batches: Sequence[PreparedBatch],
    states: Sequence[_States],
    moments: _Moments | None = None,
) -> list[Tensor]:
    """The outputs of a block on all batches; with ``moments`` none is kept."""
    found = []
    for batch, state in zip(batches, states, strict=True):
        args, named = state.others[number]
        if moments is not None:
            moments.cells = batch.layout.cell
        with runner.inside(batch):
            output = _hidden(block(state.hidden, *args, **named))
        if moments is None:
            found.append(output)
    return found


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _replace(model: Any, name: str, layer: Any, moments_KK: Tensor | None, scheme: Scheme) -> None:
    """Put the quantized form of a layer in its place."""
    weight_OK: Tensor = layer.weight.detach()
    weight_OK = weight_OK.T.contiguous() if isinstance(layer, Conv1D) else weight_OK
    if moments_KK is None:
        made = quantize(weight_OK, scheme.format, double=scheme.double)
    else:
        made = quantize_calibrated(weight_OK, moments_KK, scheme.format, double=scheme.double)
    bias = None if layer.bias is None else layer.bias.detach()
    model.set_submodule(name, QuantizedLinear(made, bias, weight_OK.dtype).eval())
