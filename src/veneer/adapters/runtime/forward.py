"""The forward of an adapted layer: the route decides which adapters act, and this file which path computes them.

    tracker     under which route does this call run?
    base_call   no adapter of the route acts here
    fast_path   base products and low-rank products in one call, forward and backward by hand
    plain_path  the base layer's own call, then each adapter's change
    overrides   the adapter's weights, biases or rows in place of the base's

An `AdaptedForward` is put on the one module at a site, as its ``forward``. The module keeps its class, name, parameters and state_dict;
removing the attribute restores it. It refers to the module, its site and the runtime, so a deep copy or a pickle of the model carries
its bank along.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.adapters.runtime.fast_path import fast_forward, reuse_call
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.layer import AdaptedLayer
from veneer.adapters.runtime.override_path import with_overrides
from veneer.adapters.runtime.plain_path import plain_forward


class AdaptedForward(AdaptedLayer):
    """The forward of the module at one site while adapters act there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        site = self.site
        site.calls += 1
        tracker = self.runtime.tracker
        current = tracker.at_site(site.name, args, kwargs)
        if current is None:
            return self.base_call(*args, **kwargs)
        if current.top != site.name:
            return self._output(current, args, kwargs)
        try:
            return self._output(current, args, kwargs)
        finally:
            tracker.leave(site.name)

    def _output(self, current: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        plan, here, site = current.plan, self.adapters, self.site
        if not any(name in here for name in plan.adapters):
            return self.base_call(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        fast = self.runtime.fast_path
        if fast and not plan.has_overrides:
            y = reuse_call(self, current, x)
            if y is not None:
                return y
        assignments = plan.uniform
        if assignments is None:
            assignments = plan.assignments(site.layer_kind.batch_shape(site.module, x), x.device, site)
        acting = [one for one in assignments if one.adapter in here]
        if not acting:
            return self.base_call(*args, **kwargs)
        overriding = [one for one in acting if here[one.adapter].overrides] if plan.has_overrides else []
        if overriding:
            acting = [one for one in acting if here[one.adapter].tensors is not None]
        y = fast_forward(self, current, acting, x) if fast and acting else None
        if y is None:
            y = self.base_call(*args, **kwargs)
            if acting:
                y = plain_forward(self, current, acting, x, y)
        return with_overrides(self, current, overriding, x, y, plain=not acting) if overriding else y
