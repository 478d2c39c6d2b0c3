"""The forms of operations on a GPU, chosen before the first step (``kernels/forms.py``).

Each fast form runs beside its reference on the base's own sizes, forward and backward. It is chosen if it agrees and is faster; one that
raises is not. The loss's chunk follows the memory that is free. A run stores the choice, and takes it again when it resumes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.attention.segmented import plain
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.kernels.attention.varlen import takes, varlen
from veneer.kernels.elementwise import functions
from veneer.kernels.forms import FEW_TOKENS, Forms
from veneer.kernels.lora.branch import Branch, Factors
from veneer.kernels.lora.grouped import GroupedBranch, TokenGrid, pad_factors
from veneer.kernels.lora.linear import adapted_linear
from veneer.kernels.lora.single import SingleBranch
from veneer.kernels.tuning import CROSS_ENTROPY_CHUNK_BYTES, GPU_CROSS_ENTROPY_CHUNK_BYTES
from veneer.models.devices import wait_for
from veneer.models.flat_check import relative_error
from veneer.training.device_memory import memory_of

Work = Callable[[], Sequence[Tensor]]
_ROUNDS = 5
_FREE_SHARE = 8
"""A chunk of the loss takes at most this part of the free memory."""
_WORTH_COMPILING = 500
"""Compiling takes some seconds for each operation, so a run of fewer steps leaves it out."""
_APART = {torch.float64: 1e-10, torch.float32: 1e-4}
_APART_NARROW = 3e-2


@dataclass(frozen=True)
class BaseSizes:
    """The sizes of a base that the trials take."""

    hidden: int
    wide: int
    heads: int
    groups: int
    head: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> BaseSizes | None:
        """Those of a model; None if its config does not have them."""
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if not isinstance(hidden, int) or not isinstance(heads, int):
            return None
        weight = next(p for p in model.parameters() if p.is_floating_point())
        return cls(
            hidden,
            int(getattr(config, "intermediate_size", None) or 4 * hidden),
            heads,
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or hidden // heads),
            weight.dtype,
            weight.device,
        )

    def random(self, *shape: int, grad: bool = True) -> Tensor:
        """Random numbers on the device, in the base's data type."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device).requires_grad_(grad)


def choose_forms(model: Any, *, tokens: int, steps: int, option: bool | str) -> Forms:
    """The forms for a run on a CUDA device; the references elsewhere, and if ``option`` (``compile``) is False.

    Args:
        model: the base, on its device.
        tokens: tokens of a pass.
        steps: the steps of the run.
        option: True compiles also for a short run.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or not torch.backends.cuda.is_built():
        return Forms()
    free = memory_of(device).free()
    chunk = None if free is None else chunk_for(free)
    sizes = BaseSizes.of(model)
    if option is False or sizes is None:
        return Forms(loss_chunk=chunk)
    compiles = option is True or steps >= _WORTH_COMPILING
    with torch.random.fork_rng([device]):
        found = Forms(
            attention="varlen" if attention_pays(sizes, tokens) else "plain",
            elementwise="compiled" if compiles and compiling_pays(sizes, tokens) else "plain",
            grouped_tokens=grouped_tokens(sizes),
            loss_chunk=chunk,
        )
    memory_of(device).give_back()
    return found


def chunk_for(free: int) -> int:
    """The bytes of a chunk of the loss, with so many free."""
    return min(GPU_CROSS_ENTROPY_CHUNK_BYTES, max(CROSS_ENTROPY_CHUNK_BYTES, free // _FREE_SHARE))


def attention_pays(sizes: BaseSizes, tokens: int) -> bool:
    """True if the kernel for several lengths is faster than one call for each length."""
    q, k, v = (sizes.random(heads, tokens, sizes.head) for heads in (sizes.heads, sizes.groups, sizes.groups))
    if not takes(q, k, v):
        return False
    segments = Segments((0, *(tokens - tokens // 2**n for n in range(1, 5)), tokens))
    scale = sizes.head**-0.5

    def with_(form: Callable[..., Tensor]) -> Work:
        def run() -> Sequence[Tensor]:
            out = form(q, k, v, segments, Pattern(), scale=scale)
            return (out, *torch.autograd.grad(out, (q, k, v), out.detach()))

        return run

    return is_equal_and_faster(with_(varlen), with_(plain), sizes)


def compiling_pays(sizes: BaseSizes, tokens: int) -> bool:
    """True if the compiled chains are faster, together."""
    x, weight = sizes.random(tokens, sizes.hidden, grad=False), sizes.random(sizes.hidden, grad=False)
    gate, up = (sizes.random(tokens, sizes.wide, grad=False) for _ in range(2))
    q, k = (sizes.random(tokens, heads, sizes.head, grad=False) for heads in (sizes.heads, sizes.groups))
    cos, sin = (sizes.random(tokens, sizes.head, grad=False) for _ in range(2))

    def with_(form: Callable[[Any], Any]) -> Work:
        @torch.no_grad()  # as in the functions' own forward and backward: code is compiled for one mode
        def run() -> Sequence[Tensor]:
            norm, back = form(functions.norm_forward), form(functions.norm_backward)
            act, act_back = form(functions.gated_forward), form(functions.gated_backward)
            return (
                norm(x, weight, 1e-6, False),
                back(x, x, weight, 1e-6, False),
                act(gate, up, "silu"),
                *act_back(up, gate, up, "silu"),
                *form(functions.rotate)(q, k, cos, sin, 1),
            )

        return run

    return is_equal_and_faster(with_(functions.compiled), with_(lambda function: function), sizes)


def grouped_tokens(sizes: BaseSizes) -> int:
    """The largest number of tokens of each adapter with which products taken together are faster."""
    most = FEW_TOKENS
    for each in (128, 256, 512, 1024, 2048, 4096):
        trial = ManyAdapters(sizes, adapters=8, each=each)
        if not is_equal_and_faster(trial.at_once, trial.one_by_one, sizes):
            break
        most = each
    return most


class ManyAdapters:
    """A linear layer with adapters of ``each`` tokens, and their products forward and backward in both forms."""

    def __init__(self, sizes: BaseSizes, *, adapters: int, each: int, rank: int = 16) -> None:
        width = sizes.hidden
        self._layers = [(sizes.random(width, width, grad=False) / width**0.5, None)]
        self._factors = [[self._made(sizes, rank)] for _ in range(adapters)]
        self._x = sizes.random(adapters * each, width)
        self._spans = [slice(each * j, each * (j + 1)) for j in range(adapters)]
        rows = [torch.arange(span.start, span.stop) for span in self._spans]
        self._grid = TokenGrid(rows, [1.0] * adapters, sizes.device)

    def _made(self, sizes: BaseSizes, rank: int) -> Factors:
        a, b = (torch.randn(*size, device=sizes.device) for size in ((rank, sizes.hidden), (sizes.hidden, rank)))
        return Factors(a.div_(sizes.hidden**0.5).requires_grad_(), b.requires_grad_(), 2.0)

    def _run(self, branches: Sequence[Branch]) -> Sequence[Tensor]:
        (out,) = adapted_linear(self._x, self._layers, branches)
        masters = [master for own in self._factors for factors in own for master in (factors.a, factors.b)]
        return (out, *torch.autograd.grad(out, (self._x, *masters), out.detach()))

    def one_by_one(self) -> Sequence[Tensor]:
        """A branch for each adapter."""
        pairs = zip(self._spans, self._factors, strict=True)
        return self._run([SingleBranch(span, 1.0, own) for span, own in pairs])

    def at_once(self) -> Sequence[Tensor]:
        """One branch for all of them."""
        stacked = pad_factors(self._factors, self._layers, self._grid)
        return self._run([GroupedBranch(self._grid, self._factors, stacked)])


def is_equal_and_faster(fast: Work, reference: Work, sizes: BaseSizes) -> bool:
    """True if a form gives the reference's results and takes less time. A form that raises does not pay."""
    try:
        pairs = zip(fast(), reference(), strict=True)
        bound = _APART.get(sizes.dtype, _APART_NARROW)
        if not all(relative_error(one.detach(), other.detach()) <= bound for one, other in pairs):
            return False
        return _seconds(fast, sizes.device) < _seconds(reference, sizes.device)
    except Exception:  # a kernel or a compiler that this machine does not have may raise anything
        return False


def _seconds(work: Work, device: torch.device) -> float:
    """The median time over a few rounds."""
    found = []
    for _ in range(_ROUNDS):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)
