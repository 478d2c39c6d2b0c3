"""What an adapted layer computes: the base layer's own call, then the adapters' changes.

A `AdaptedForward` is put on the one module that stands at a site, as its ``forward``. The module keeps its class, its name, its
parameters and its state_dict; taking the attribute away again leaves it as it was. It holds references only to the module, its site
and the bank, so a deep copy or a pickle of the model carries its bank along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.adapters.layers.kinds import LAYER_KINDS, LayerKind
from veneer.adapters.layers.site import Site
from veneer.adapters.overrides import with_own
from veneer.adapters.runtime.fast_path import again, fused
from veneer.adapters.runtime.forward_pass import Pass
from veneer.kernels.lora.dropout import drop
from veneer.kernels.lora.reference import Term, adapted

if TYPE_CHECKING:
    from veneer.adapters.bank import Bank


class AdaptedForward:
    """The forward of the module at one site while adapters of a bank act there."""

    def __init__(self, site: Site, bank: Bank, inner: Callable[..., Tensor] | None) -> None:
        self.site = site
        self.bank = bank
        self.inner = inner
        """A forward that already stood on the instance (another library's hook), kept and called."""
        self.users: dict[str, None] = {}
        """Names of the adapters that act here."""
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        name = self.site.name
        current = self.bank.traffic.at_site(name, args, kwargs)
        if current is None:
            return self.base(*args, **kwargs)
        if current.top != name:
            return self._output(current, args, kwargs)
        try:
            return self._output(current, args, kwargs)
        finally:
            self.bank.traffic.leave(name)

    def _output(self, current: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not any(name in self.users for name in current.route.names):
            return self.base(*args, **kwargs)
        site = self.site
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        y = again(self, current, x)
        if y is not None:
            return y
        parts = current.chart.parts(
            site.layer_kind.lead(site.module, x), x.device, site.name, site.is_head, site.layout
        )
        parts = [part for part in parts if part[0] in self.users]
        if not parts:
            return self.base(*args, **kwargs)
        own = [part for part in parts if site.name in self.bank[part[0]].overrides]
        if own:
            parts = [part for part in parts if self.bank[part[0]].acts_at(site)]
        y = fused(self, current, parts, x) if parts else None
        if y is None:
            y = self.base(*args, **kwargs)
            if parts:
                y = self._add(x, y, [self._term(current, *part, y) for part in parts])
        return with_own(self, current, own, x, y, plain=not parts) if own else y

    def _add(self, x: Tensor, y: Tensor, terms: list[Term]) -> Tensor:
        host, module = self.site.layer_kind, self.site.module
        bias = host.bias(module)
        x_N = host.flatten(x)
        y_N = y.reshape(x_N.shape[0], *y.shape[y.dim() - (3 if host.kind == "conv2d" else 1) :])
        bias = None if bias is None else host.per_output(bias)
        return adapted(y_N, x_N, bias, terms).reshape(y.shape)

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own output."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        module = self.site.module
        forward: Callable[..., Tensor] = type(module).forward
        return forward(module, *args, **kwargs)

    def _term(self, current: Pass, name: str, rows: Tensor | None, weight: float | Tensor, y: Tensor) -> Term:
        adapter = self.bank[name]
        site = self.site
        tensors = adapter.tensors.get(site.name)
        if tensors is None:
            return self._tied_term(adapter, rows, weight, y)
        host, module = site.layer_kind, site.module
        names = adapter.method.factor_names(site.kind)
        a, b = tensors[names[0]].to(y.dtype), tensors[names[1]].to(y.dtype)
        scale = adapter.scale(site.name)
        norm = self.norm(current, adapter)
        gain = None if norm is None else adapter.method.magnitude_scale(tensors, norm)
        dropout = self.dropout(current, adapter)
        product = None
        if dropout is not None and adapter.method.drops_base_product:
            product = self._product
        return Term(
            rows,
            weight if isinstance(weight, float) else weight.to(y.dtype),
            lambda x_n: host.low(module, x_n, a, b) * scale,
            None if dropout is None else lambda x_n: drop(x_n, *dropout),
            None if gain is None else host.per_output(gain),
            product,
        )

    def _tied_term(self, adapter: Adapter, rows: Tensor | None, weight: float | Tensor, y: Tensor) -> Term:
        """The head's share of an adapter on the embedding that it is tied to (``ensure_weight_tying``)."""
        source = self.site.tied_to
        assert source is not None
        tensors = adapter.tensors[source]
        a, b = tensors["lora_embedding_B"].T.to(y.dtype), tensors["lora_embedding_A"].T.to(y.dtype)
        scale, host, module = adapter.scale(source), LAYER_KINDS["tied_head"], self.site.module
        return Term(
            rows,
            weight if isinstance(weight, float) else weight.to(y.dtype),
            lambda x_n: host.low(module, x_n, a, b) * scale,
        )

    def norm(self, current: Pass, adapter: Adapter) -> Tensor | None:
        """||W + s B A||_row at this site for a method with a magnitude. Where it is a constant in backward it is computed once a pass,
        however often the layer runs in it."""
        method = adapter.method
        if method.norms == "none":
            return None
        key = (adapter.name, self.site.name)
        norm = current.norms.get(key)
        if norm is None and current.lasting and method.norms == "constant":
            self._constant_norms(current)
            norm = current.norms[key]
        if norm is None:
            tensors: dict[str, Tensor] = dict(adapter.tensors[self.site.name])
            norm = method.norm(tensors, self.site.weight_2d, self.site.squared_norms(), adapter.scale(self.site.name))
        return norm

    def _constant_norms(self, current: Pass) -> None:
        """The norms of all adapters of the pass at this site, in one go over its weight."""
        name, bank = self.site.name, self.bank
        here = [bank[one] for one in current.route.names if one in self.users and name in bank[one].tensors]
        here = [one for one in here if one.method.norms == "constant"]
        each = [(dict(one.tensors[name]), one.scale(name)) for one in here]
        norms = here[0].method.constant_norms(self.site.weight_2d, self.site.squared_norms(), each)
        current.norms.update({(one.name, name): norm for one, norm in zip(here, norms, strict=True)})

    def dropout(self, current: Pass, adapter: Adapter) -> tuple[float, int] | None:
        """(p, seed) of an adapter's dropout at this site in this pass, or None where nothing is dropped.

        The stream is the adapter's own, keyed by its seed, the pass and the site: neighbours in the batch cannot shift it, and running the
        layer again draws the same mask.
        """
        p = adapter.method.lora_dropout
        training = self.site.module.training if current.training is None else current.training
        if p == 0 or not training or self.site.kind == "embedding":
            return None
        number = current.draws.get(adapter.name)
        if number is None:
            adapter.draws += 1
            number = current.draws[adapter.name] = adapter.draws
        return p, stream_seed(adapter.seed, "dropout", number, self.site.name)

    def _product(self, x_n: Tensor) -> Tensor:
        """W x without the bias, by the base layer's own call."""
        host: LayerKind = self.site.layer_kind
        y = self.base(x_n)
        bias = host.bias(self.site.module)
        return y if bias is None else y - host.per_output(bias)
