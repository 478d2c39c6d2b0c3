"""Routers: the layers that choose a token's experts. They are adapted only where a pattern names them.

A router that is a linear layer is a site like any other. Most of transformers' routers also choose the experts in their forward:

    scores = F.linear(x, weight)      perhaps with the weight cast to float32, and with a bias
    ...                               the experts and their weights by the scores

Adapters change the scores (`RouterKind`): the product is seen while the module's own forward runs (`ScoreProducts`), and the adapters'
changes are added to it (``runtime/mixture.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from veneer.adapters.layers.experts import experts_kind_for
from veneer.adapters.layers.kinds import Geometry, LayerKind
from veneer.adapters.layers.site import Site

_CASTS = frozenset({"type", "to", "float", "contiguous"})
"""Methods of tensors whose result has the values of the weight."""
NO_PRODUCT = "its scores are not one F.linear of its input and its weight, and only such routers can be adapted; adapt the experts"


class RouterKind(LayerKind):
    """A module with a weight [experts, in] that computes scores and chooses by them."""

    is_layer = False

    def geometry(self, module: Any) -> Geometry:
        return Geometry(self.kind, *module.weight.shape)

    def bias(self, module: Any) -> Tensor | None:
        bias: Tensor | None = module._parameters.get("bias")
        return bias


class ScoreProducts(TorchFunctionMode):
    """While it is entered, each product of a router's input with its weight is what ``change`` makes of it.

    Args:
        sites: the routers.
        change: (site, input, product) -> the scores.
    """

    def __init__(self, sites: Iterable[Site], change: Callable[[Site, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        # Casts are kept, so that no other tensor gets their address meanwhile.
        self._weights = {id(site.weight): (site, site.weight) for site in sites}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.linear and len(args) > 1 and id(args[1]) in self._weights:
            site, _ = self._weights[id(args[1])]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            same = bias is site.layer_kind.bias(site.module)
            return self.change(site, args[0], found) if same else found
        if args and getattr(func, "__name__", "") in _CASTS and id(args[0]) in self._weights:
            site, _ = self._weights[id(args[0])]
            self._weights[id(found)] = (site, found)
        return found


_ROUTER = RouterKind()


def expert_counts(paths: Mapping[str, nn.Module]) -> dict[str, int]:
    """{path of a module that holds experts, stacked or as modules of their own: their number}."""
    found = {}
    for path, module in paths.items():
        holder, _, tail = path.rpartition(".")
        kind, _ = experts_kind_for(module)
        if kind is not None:
            found[holder] = kind.count(module)
        elif tail == "experts" and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found[holder] = len(module)
    return found


def experts_chosen(name: str, counts: Mapping[str, int]) -> int | None:
    """Number of experts that a layer of this path chooses from, if it is a router: it stands beside them, or in a router there."""
    holder, _, _ = name.rpartition(".")
    around, _, tail = holder.rpartition(".")
    inside = holder and ("router" in tail or "gate" in tail)
    return counts.get(holder, counts.get(around) if inside else None)


def router_kind_for(module: nn.Module, count: int | None) -> RouterKind | None:
    """The kind of a module with one row of its weight for each of ``count`` experts, or None."""
    weight = module._parameters.get("weight") if count else None
    if weight is None or isinstance(weight, nn.UninitializedParameter):
        return None
    return _ROUTER if weight.dim() == 2 and len(weight) == count and weight.is_floating_point() else None
