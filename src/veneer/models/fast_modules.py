"""Faster forms of a model's elementwise chains, put on its own modules one instance at a time.

    with fast_modules(model) as found:        # {"norm": 61, "gated": 30, "rotary": 30}
        ...                                   # afterwards nothing is left

A module is changed by one instance attribute (``forward``), as at an adapter's site; no class and no function of another library is
touched. Modules are not chosen by name: for each kind, the faster form runs once beside the module's own forward on random inputs, and
is used only if the results agree.

    norm       RMSNorm in Llama's or Gemma's form, not trained
    gated      down(act(gate(x)) * up(x)): the activation and its product; the three layers are called as before
    rotary     attention whose forward calls ``apply_rotary_pos_emb(q, k, cos, sin)``: the same code runs, with that one name bound to
               the kernel
    gelu       GELU's tanh form written out in eight operations (GPT-2's), as the one operation that torch has for it

Results differ from the model's own in the last place (sums are taken in another order). So this is not part of attaching a bank, which is
invisible to the bit; a training run asks for it. Under autocast, and for inputs of another kind than a kernel takes, the module's own
forward runs.
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels.elementwise.functions import ACTIVATIONS, gated, rms_norm, rotary

Whole = Callable[[nn.Module], AbstractContextManager[None]]
"""Makes a context in which a module's weights are whole."""
_ROTARY = "apply_rotary_pos_emb"
_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@contextmanager
def fast_modules(model: nn.Module, whole: Whole | None = None) -> Iterator[dict[str, int]]:
    """Use faster forms inside the context; yields the number of each kind. Leave it after `Bank.detach`, which puts back what it found."""
    try:
        yield use_fast_forwards(model, whole)
    finally:
        restore_forwards(model)


def use_fast_forwards(model: nn.Module, whole: Whole | None = None) -> dict[str, int]:
    """Put faster forms on every module that has one, and tell how many of each kind; what has one already is counted again.

    whole: see `Whole`; needed where several processes hold parts of the weights.
    """
    found = {kind.name: 0 for kind in _KINDS}
    verdicts: dict[tuple[object, ...], _Fast | None] = {}
    for module in model.modules():
        standing = module.__dict__.get("forward")
        if isinstance(standing, _Fast):
            found[standing.name] += 1
        if standing is not None:
            continue
        key = _likeness(module)
        if key not in verdicts:
            verdicts[key] = _fast_form(module, whole)
        fast = verdicts[key]
        if fast is not None:
            module.forward = fast.on(module)
            found[fast.name] += 1
    return found


def _fast_form(module: nn.Module, whole: Whole | None) -> _Fast | None:
    """The form that agrees with a module's own, if there is any."""
    candidates = list(_candidates(module))
    if not candidates:
        return None
    with nullcontext() if whole is None else whole(module):
        return next((fast for fast in candidates if fast.agrees()), None)


def restore_forwards(model: nn.Module) -> None:
    """Take the faster forms off again."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Fast):
            del module.__dict__["forward"]


class _Fast(ABC):
    """The forward of one module in a faster form."""

    name = ""

    def __init__(self, module: Any, variant: str = "") -> None:
        self.module = module
        self.variant = variant

    def on(self, module: nn.Module) -> _Fast:
        """The same for another module of its kind."""
        return type(self)(module, self.variant)

    @classmethod
    @abstractmethod
    def variants(cls, module: Any) -> tuple[str, ...]:
        """Variants to try on a module; empty if the module is of another kind."""

    @abstractmethod
    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """The faster form."""

    def inputs(self) -> tuple[Tensor, ...]:
        """Random inputs to compare on."""
        return ()

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """True if the faster form supports these inputs."""
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or not self.takes(*args, **kwargs):
            return self.own(*args, **kwargs)
        return self.fast(*args, **kwargs)

    def agrees(self) -> bool:
        """True if both forms give the same result on random inputs."""
        try:
            args = self.inputs()
            with torch.no_grad():
                return self.takes(*args) and _alike(self.fast(*args), self.own(*args))
        except Exception:  # a module that merely looks alike may fail in any way
            return False


class _FastNorm(_Fast):
    name = "norm"

    @classmethod
    def variants(cls, module: Any) -> tuple[str, ...]:
        weight = module._parameters.get("weight")
        one = weight is not None and weight.dim() == 1 and len(module._parameters) == 1 and not module._modules
        return ("", "one_plus") if one and _eps(module) is not None and "RMSNorm" in type(module).__name__ else ()

    def inputs(self) -> tuple[Tensor, ...]:
        # Of very different sizes, so that a wrong eps shows.
        x = _random(self.module.weight, 6, self.module.weight.numel())
        return (x * torch.tensor([1e-3, 1e-2, 0.1, 1, 10, 100], device=x.device).to(x.dtype)[:, None],)

    def takes(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        weight = self.module.weight
        plain = isinstance(x, Tensor) and not args and not kwargs and not weight.requires_grad
        return plain and x.dtype == weight.dtype and x.shape[-1] == weight.shape[0]

    def fast(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.module.weight, _eps(self.module) or 0.0, one_plus=self.variant == "one_plus")


class _FastGated(_Fast):
    name = "gated"

    @classmethod
    def variants(cls, module: Any) -> tuple[str, ...]:
        layers = {"gate_proj", "up_proj", "down_proj"}
        return ACTIVATIONS if layers <= set(module._modules) and callable(getattr(module, "act_fn", None)) else ()

    def inputs(self) -> tuple[Tensor, ...]:
        layer = self.module.gate_proj
        return (_random(_computes_in(layer), 1, 4, layer.in_features),)

    def takes(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and not args and not kwargs

    def fast(self, x: Tensor) -> Tensor:
        module = self.module
        down: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), self.variant))
        return down


class _FastGelu(_Fast):
    name = "gelu"

    @classmethod
    def variants(cls, module: Any) -> tuple[str, ...]:
        return ("tanh",) if type(module).__name__ == "NewGELUActivation" else ()

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.linspace(-6, 6, 49),)

    def fast(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class _FastRotary(_Fast):
    name = "rotary"

    def __init__(self, module: Any, variant: str = "") -> None:
        super().__init__(module, variant)
        self._bound: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    @classmethod
    def variants(cls, module: Any) -> tuple[str, ...]:
        forward = type(module).forward
        code = getattr(forward, "__code__", None)
        return ("half",) if code is not None and _ROTARY in code.co_names and _ROTARY in forward.__globals__ else ()

    def agrees(self) -> bool:
        """Compares the one function that is exchanged; everything else is the module's own code."""
        like = _computes_in(self.module)
        q, k = _random(like, 2, 3, 5, 8), _random(like, 2, 1, 5, 8)
        cos, sin = _random(like, 2, 5, 8), _random(like, 2, 5, 8)
        original = type(self.module).forward.__globals__[_ROTARY]
        try:
            return _alike(_turner(original)(q, k, cos, sin), original(q, k, cos, sin))
        except Exception:
            return False

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        if self._bound is None:
            own = type(self.module).forward
            names = {**own.__globals__, _ROTARY: _turner(own.__globals__[_ROTARY])}
            bound = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            bound.__kwdefaults__ = own.__kwdefaults__
            self._bound = bound
        return self._bound(self.module, *args, **kwargs)


def _turner(original: Callable[..., Any]) -> Callable[..., Any]:
    """``apply_rotary_pos_emb`` by the kernel where its arguments are [B, H, T, D] and [B or 1, T, D], else as it was."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        usual = not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        usual = usual and q.shape[::2] == k.shape[::2]
        if not usual or not all(_turns(x, cos) for x in (q, k)) or cos.requires_grad:
            return original(q, k, cos, sin, *args, **kwargs)
        batch, _, tokens, width = q.shape
        heads = [x.transpose(1, 2).reshape(batch * tokens, x.shape[1], width) for x in (q, k)]
        angles = [t.expand(batch, tokens, width).reshape(batch * tokens, width) for t in (cos, sin)]
        found = rotary(heads[0], heads[1], angles[0], angles[1])
        return tuple(x.view(batch, tokens, -1, width).transpose(1, 2) for x in found)

    return turn


def _turns(x_BHTD: Tensor, cos: Tensor) -> bool:
    batch, _, tokens, width = x_BHTD.shape
    return (
        x_BHTD.dtype == cos.dtype
        and width % 2 == 0
        and tuple(cos.shape) in ((batch, tokens, width), (1, tokens, width))
    )


_KINDS: tuple[type[_Fast], ...] = (_FastNorm, _FastGated, _FastGelu, _FastRotary)


def _candidates(module: nn.Module) -> Iterator[_Fast]:
    for kind in _KINDS:
        for variant in kind.variants(module):
            yield kind(module, variant)


def _likeness(module: Any) -> tuple[object, ...]:
    """Modules with equal keys are checked once: class, activation, eps, and the shapes and dtypes of their weights."""
    weights = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in module.named_parameters(recurse=False))
    return type(module), type(getattr(module, "act_fn", None)), _eps(module), weights, module.training


def _eps(module: Any) -> float | None:
    return next(
        (float(e) for name in ("variance_epsilon", "eps") if (e := module.__dict__.get(name)) is not None), None
    )


def _computes_in(module: nn.Module) -> Tensor:
    """A tensor with the data type and device that the module computes in. The packed numbers of a quantized layer are whole numbers."""
    return next(t for t in chain(module.parameters(), module.buffers()) if t.is_floating_point())


def _random(like: Tensor, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw).to(device=like.device, dtype=like.dtype)


def _alike(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(_alike(a, b) for a, b in zip(found, expected, strict=True))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    scale = expected.double().norm(dim=-1).clamp_min(1e-30)
    return bool(((found.double() - expected.double()).norm(dim=-1) <= _BOUND[expected.dtype] * scale).all())
