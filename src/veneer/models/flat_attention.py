"""Attention inside segments, through transformers' extension point, for one call at a time.

transformers looks up attention and mask functions by a name in the model's config. During a flat call that name is ``veneer_flat``:

* The mask function returns a ``SegmentMask`` in place of a tensor: the segments, and the keys that a query of this kind of layer sees. It
  finds them by evaluating transformers' own mask rule on pairs of tokens.
* The attention function reads everything from that object and calls ``segment_attention``.

A layer that runs again in backward (activation checkpointing) may find another name in the config, so during a flat call the model's
checkpointing function is replaced by one that sets the name again. Other threads may call the model meanwhile; their calls go to the
original functions. All changes are undone when the last flat call ends.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from veneer.errors import BaseModelError
from veneer.kernels.attention.prepended import Prepended
from veneer.kernels.attention.segmented import segment_attention
from veneer.kernels.attention.segments import Pattern, Segments

NAME = "veneer_flat"
_HARMLESS = ("position_ids", "cache_position")  # tensors that attention functions are handed and need not use


Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, Pattern, float, "torch.Tensor | None"], torch.Tensor]
"""Attention in place of the segments' own: (number of the call in the pass, q [H, T, D], k [G, T, D], v [G, T, E], pattern, scale,
sinks [H]) -> [T, H, E]."""


class NotFlat(BaseModelError):
    """This model's attention carries something that cannot be run inside segments; the probe turns it into a reason."""


@dataclass(frozen=True)
class SegmentMask:
    """The object that a layer receives in place of its attention mask.

    No operation takes it, so a layer that uses it in any other way than handing it on fails. One such way is a
    layer that a caller wrapped in checkpointing by hand: it runs again in backward when the config says its
    ordinary name again.
    """

    segments: Segments
    attend: Attend | None  # kept here, since a layer that runs again in backward does so outside of its flat call
    prepended: Prepended | None
    pattern: Pattern | NotFlat  # an error is raised only if a layer uses this mask: some models make more than they use

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if _local.segments is None:
            raise BaseModelError(
                f"a layer of a flat batch was run again outside its flat call, so its segments cannot be applied ({name}); for "
                f"activation checkpointing use model.gradient_checkpointing_enable(), which a FlatRunner knows"
            )
        raise NotFlat(f"its attention computes with the mask itself ({name}), as models with position biases do")


class _Local(threading.local):
    """This thread's flat call, if any, and what it met."""

    segments: Segments | None = None
    calls: int = 0
    attend: Attend | None = None
    prepended: Prepended | None = None


_local = _Local()


@dataclass
class _Replaced:
    """An attribute that switches have replaced: its owner, its own value, and the number of switches that are on."""

    owner: Any
    value: Any
    switches: int = 0


_lock = threading.Lock()
_names: dict[int, _Replaced] = {}
"""By the id of a config: the name of its attention implementation."""
_functions: dict[int, _Replaced] = {}
"""By the id of a module: its checkpointing function."""


class Switch:
    """Makes one model flat for the length of a ``with`` block.

    Blocks may nest and may run in several threads at once, as may several switches of one model; the config is as before when the last
    one ends.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        register()
        self._model = model
        self._configs = _configs(model)
        self._depth = 0
        self._modules: list[torch.nn.Module] = []

    @contextlib.contextmanager
    def flat(
        self, segments: Segments, attend: Attend | None = None, prepended: Prepended | None = None
    ) -> Iterator[None]:
        """Run the model on ``segments`` in this block and this thread; ``attend`` replaces attention inside them."""
        before = _local.segments, _local.attend, _local.prepended
        with self._named():
            _local.segments, _local.attend, _local.prepended, _local.calls = segments, attend, prepended, 0
            try:
                yield
            finally:
                _local.segments, _local.attend, _local.prepended = before

    @property
    def attention_calls(self) -> int:
        """Number of attention calls in this thread's current or last flat block."""
        return _local.calls

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        with _lock:
            if self._depth == 0:
                self._set()
            self._depth += 1
        try:
            yield
        finally:
            with _lock:
                self._depth -= 1
                if self._depth == 0:
                    self._unset()

    def _set(self) -> None:
        for config in self._configs:
            name = _names.setdefault(id(config), _Replaced(config, config._attn_implementation_internal))
            name.switches += 1
            config._attn_implementation_internal = NAME
        for module in self._model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None:
                entry = _functions.setdefault(id(module), _Replaced(module, function))
                entry.switches += 1
                self._modules.append(module)
                if not isinstance(function, _Replayed):
                    entry.value = function
                    module._gradient_checkpointing_func = _Replayed(self, function)  # type: ignore[assignment]

    def _unset(self) -> None:
        for config in self._configs:
            if (name := _released(_names, config)) is not None:
                config._attn_implementation_internal = name.value
        while self._modules:
            module = self._modules.pop()
            function = _released(_functions, module)
            if function and isinstance(module.__dict__.get("_gradient_checkpointing_func"), _Replayed):
                module._gradient_checkpointing_func = function.value


def _released(replaced: dict[int, _Replaced], owner: Any) -> _Replaced | None:
    """The entry of an owner if a switch that goes off was its last one; it is removed."""
    entry = replaced[id(owner)]
    entry.switches -= 1
    return None if entry.switches else replaced.pop(id(owner))


class _Replayed:
    """A checkpointing function whose work finds the config switched again when it is repeated in backward."""

    def __init__(self, switch: Switch, checkpoint: Callable[..., Any]) -> None:
        self._switch = switch
        self._checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _local.segments is None:  # an ordinary call of another thread
            return self._checkpoint(function, *args, **kwargs)

        def switched(*inner: Any, **named: Any) -> Any:
            with self._switch._named():
                return function(*inner, **named)

        return self._checkpoint(switched, *args, **kwargs)


def register() -> None:
    """Make the name known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _configs(model: torch.nn.Module) -> list[Any]:
    """Every config object in the model that names an attention implementation, once each."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _mask(*args: Any, **kwargs: Any) -> Any:
    """transformers' mask function: a ``SegmentMask`` in a flat call, else what the model's own implementation makes."""
    if _local.segments is None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        return ALL_MASK_ATTENTION_FUNCTIONS[_implementation(kwargs.get("config"))](*args, **kwargs)
    try:
        pattern: Pattern | NotFlat = _pattern(kwargs["mask_function"], kwargs.get("local_size"))
    except NotFlat as error:
        pattern = error
    return SegmentMask(_local.segments, _local.attend, _local.prepended, pattern)


def _pattern(rule: Callable[..., Any], window: int | None) -> Pattern:
    """Find the reach of a mask rule by asking it which keys one query in the middle of a long segment sees.

    Raises:
        NotFlat: the visible keys are not one run around the query, or depend on where the query stands.
    """
    span = 2 * (window or 16) + 8
    reaches = []
    for at in (span, span + 7):
        zero, query, keys = torch.tensor(0), torch.tensor(at), torch.arange(2 * span + 8)
        seen = torch.as_tensor(rule(zero, zero, query, keys)).expand(len(keys)).nonzero().flatten()
        if len(seen) == 0 or seen[-1] - seen[0] + 1 != len(seen) or not seen[0] <= at <= seen[-1]:
            raise NotFlat("its attention mask is not one run of neighbouring tokens")
        before = None if seen[0] == 0 else at - int(seen[0])
        after = None if seen[-1] == len(keys) - 1 else int(seen[-1]) - at
        reaches.append((before, after))
    if reaches[0] != reaches[1]:
        raise NotFlat("its attention mask depends on where a token stands")
    return Pattern(*reaches[0])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, T, D] and key, value [1, G, T, D] -> [1, T, H, D]."""
    if not isinstance(attention_mask, SegmentMask):
        if _local.segments is None:
            out: tuple[torch.Tensor, None] = _ordinary(module)(
                module, query, key, value, attention_mask, *args, **kwargs
            )
            return out
        raise NotFlat("its layers do not hand the attention mask on")
    pattern = attention_mask.pattern
    if isinstance(pattern, NotFlat):
        raise pattern
    _local.calls += 1
    sinks = kwargs.pop("s_aux", None)
    if args or kwargs.get("output_attentions"):
        raise NotFlat("its attention is asked for more than its output")
    for name, extra in kwargs.items():
        if isinstance(extra, torch.Tensor) and name not in _HARMLESS:
            raise NotFlat(f"its attention carries {name}, which has no form inside segments")
    given = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else float(given)
    pattern = Pattern(pattern.before, pattern.after, kwargs.get("softcap"))
    if attention_mask.attend is not None:
        return attention_mask.attend(_local.calls - 1, query[0], key[0], value[0], pattern, scale, sinks)[None], None
    q, k, v, segments = query[0], key[0], value[0], attention_mask.segments
    prepended = attention_mask.prepended
    if prepended is not None and prepended.has_past:
        layer = _layer_of(module, prepended, k, v)
        q, k, v = prepended.queries(q), prepended.keys(k, layer), prepended.values(v, layer)
        segments = prepended.segments
    dropout = float(kwargs.get("dropout") or 0.0)
    out_THD = segment_attention(q, k, v, segments, pattern, scale=scale, sinks_H=sinks, dropout=dropout)
    if prepended is not None and prepended.has_past:
        out_THD = out_THD[prepended.kept.to(out_THD.device)]
    return out_THD[None], None


def _layer_of(module: torch.nn.Module, prepended: Prepended, k: torch.Tensor, v: torch.Tensor) -> int:
    """The number of an attention layer among those that a prefix has keys and values for."""
    layer = getattr(module, "layer_idx", None)
    past = next(each for each in prepended.past if each is not None)
    width = past.shape[-1]
    if not isinstance(layer, int) or 2 * layer + 1 >= past.shape[1]:
        raise BaseModelError(
            f"{type(module).__name__} does not say which layer of the base it is, so a prefix has no keys and values for it; use "
            "another method, such as prompt"
        )
    found = (k.shape[0] * k.shape[-1], v.shape[0] * v.shape[-1])
    if found != (width, width):
        raise BaseModelError(
            f"layer {layer} has keys and values of {found[0]} and {found[1]} features, and the prefix has {width}: it was made for "
            "another base"
        )
    return layer


def _implementation(config: Any) -> str:
    """The attention implementation that a config named before it was switched."""
    entry = _names.get(id(config))
    return str(entry.value if entry else config._attn_implementation_internal)


def _ordinary(module: torch.nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _implementation(getattr(module, "config", None))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None:
        raise BaseModelError(
            f"{type(module).__name__} was called outside a flat batch while one was running, and its attention {name!r} is "
            f"unknown; run one call after the other"
        )
    return found  # type: ignore[no-any-return]
