"""One adapted layer: what the plain, the fast and the override path have in common.

A layer knows its site, the forward that stood there before, and for each of its adapters an `AdapterAtSite`: the adapter's factors and
the method's answers, resolved once when the adapter is installed. The paths ask for the base layer's own call, the norm behind a
magnitude, and the dropout of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.runtime import Runtime
from veneer.kernels.lora.dropout import Dropout


@dataclass(frozen=True, eq=False)
class AdapterAtSite:
    """One adapter at one layer.

    Attributes:
        tensors: its factors there, by name; None where it has overrides only.
        a, b: names of the factors, if any. A head that follows a tied embedding has the embedding's, exchanged, transposed (`tied`).
        scale: s in W + s B A.
        norms, drops_base_product: the method's answers (``methods/base.py``).
        overrides: whether it has overrides at the layer.
    """

    adapter: Adapter
    tensors: Mapping[str, nn.Parameter] | None
    a: str
    b: str
    scale: float
    tied: bool
    norms: str
    drops_base_product: bool
    overrides: bool


def adapter_at(adapter: Adapter, site: Site) -> AdapterAtSite:
    """Resolve an adapter at a site."""
    method, name = adapter.method, site.name
    tied = adapter.follows_at(site)
    source = site.tied_to if tied else name
    tensors = None if source is None else adapter.tensors.get(source)
    a, b = method.tensor_names("embedding" if tied else site.kind)[:2] if method.low_rank else ("", "")
    scale = 1.0 if tensors is None or source is None else adapter.scale(source)
    norms = "none" if tied or tensors is None else method.norms
    a, b = (b, a) if tied else (a, b)
    return AdapterAtSite(
        adapter, tensors, a, b, scale, tied, norms, method.drops_base_product, name in adapter.overrides
    )


class AdaptedLayer:
    """The module at one site while adapters act on it.

    Attributes:
        inner: a forward that stood on the instance before (another library's hook), kept and called.
        adapters: the adapters that act here, by name.
    """

    def __init__(self, site: Site, runtime: Runtime, inner: Callable[..., Tensor] | None) -> None:
        self.site = site
        self.runtime = runtime
        self.inner = inner
        self.adapters: dict[str, AdapterAtSite] = {}

    def admit(self, site: Site, adapter: Adapter) -> None:
        """Let an adapter act at a site that this layer computes."""
        self.adapters[adapter.name] = adapter_at(adapter, site)

    def release(self, site: Site, name: str) -> None:
        """Take an adapter off such a site."""
        self.adapters.pop(name, None)

    def base_call(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own output."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        module = self.site.module
        forward: Callable[..., Tensor] = type(module).forward
        return forward(module, *args, **kwargs)

    def norm(self, current: ForwardPass, at: AdapterAtSite, weight_2d: Tensor | None = None) -> Tensor | None:
        """||W + s B A||_row for a method with a magnitude, else None.

        A norm that is constant in backward is computed once a pass, however often the layer runs in it, and for all adapters of the
        pass in one read of the base weight. ``weight_2d``: that weight as [out, in], where the caller has it.
        """
        if at.norms == "none":
            return None
        name = self.site.name
        norm = current.norms.get((at.adapter.name, name))
        if norm is not None:
            return norm
        weight_2d = self.site.weight_2d if weight_2d is None else weight_2d
        if current.lasting and at.norms == "constant":
            others = [self.adapters[one] for one in current.route.names if one in self.adapters]
            same = type(at.adapter.method)  # each method computes its own norms
            here = [
                one for one in others if type(one.adapter.method) is same and one.norms == "constant" and one.tensors
            ]
            each = [(one.tensors or {}, one.scale) for one in here]
            norms = at.adapter.method.constant_norms(weight_2d, self.site.squared_norms(), each)
            current.norms.update({(one.adapter.name, name): norm for one, norm in zip(here, norms, strict=True)})
            return current.norms[at.adapter.name, name]
        return at.adapter.method.norm(at.tensors or {}, weight_2d, self.site.squared_norms(), at.scale)

    def dropout(self, current: ForwardPass, adapter: Adapter) -> Dropout | None:
        """An adapter's dropout at this layer in this pass, or None where nothing is dropped.

        The stream belongs to the adapter and is keyed by its seed, the pass and the site: other adapters in the batch do not shift it,
        and running the layer again draws the same mask.
        """
        p = adapter.method.dropout if current.plan.drops else 0.0
        if p == 0 or not self.training(current) or self.site.kind == "embedding":
            return None
        number = current.draws.get(adapter.name)
        if number is None:
            adapter.draws += 1
            number = current.draws[adapter.name] = adapter.draws
        windows = {} if current.context is None else current.context.windows
        return Dropout(p, stream_seed(adapter.seed, "dropout", number, self.site.name), windows.get(adapter.name))

    def training(self, current: ForwardPass) -> bool:
        """True if adapters drop out here."""
        return self.site.module.training if current.training is None else current.training
