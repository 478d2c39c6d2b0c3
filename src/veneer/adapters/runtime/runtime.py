"""The runtime: everything that adapted layers share while a model runs.

The caches on the forward path, from the longest-lived to the shortest:

    Site.squared_norms   ||W||^2 per row; key: the base weight's storage, version, dtype and device; until the weight changes
    FrozenFactors        a frozen adapter's factors, cast and scaled (``frozen.py``); key: site, adapters, their versions, base weights;
                         one entry per adapter and two per set of adapters at each site
    RoutePlan            assignments, groups and reused calls with their kernel layouts (``plan.py``); key: route and input shapes,
                         for reused calls adapter versions and base weights too; last four routes, until an adapter joins or leaves
    ForwardPass          constant norms and adapter versions (``forward_pass.py``); key: adapter, site; one call of the model
    SharedOutputs        outputs of layers computed along with the first of their group (``forward_pass.py``); key: thread, pass, input;
                         until the next layer outside the group

Copies and pickles of a model leave all of them behind; they are rebuilt on first use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from veneer.adapters.adapter import Adapter
from veneer.adapters.runtime.frozen import FrozenFactors
from veneer.adapters.runtime.tracker import RouteTracker


@dataclass(eq=False)
class Runtime:
    """The state that the forward of an adapted layer reads. Owned by one bank.

    Attributes:
        adapters: the bank's adapters by name.
        tracker: under which route each call of the model runs.
        layers: the `AdaptedForward` at each patched site, by the site's name.
        frozen: kept factors of frozen adapters.
        fast_path: whether layers may use the fast path.
        owner: the bank, for `bank_of`.
    """

    adapters: dict[str, Adapter]
    tracker: RouteTracker
    owner: Any
    layers: dict[str, Any] = field(default_factory=dict)
    frozen: FrozenFactors = field(default_factory=FrozenFactors)
    fast_path: bool = True
