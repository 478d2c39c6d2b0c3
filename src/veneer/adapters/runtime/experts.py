"""Adapters on stacked experts: the pairs that each adapter has, and its change.

The layer kind (``layers/experts.py``) computes the stack; here each adapter's change is added to the output of its projections:

    y_s = C_s * (x_s W_e^T) + sum_j w_sj S_je s_j B_je A_je x_s + b_e        for the pair s of a token and the expert e

the formula of ``kernels/lora/reference.py`` with the weight, the factors and the magnitude scale of the pair's expert. Pairs of one
adapter and one expert are a group, and all groups of a projection are computed in one call (``kernels/lora/by_group.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.experts import ExpertLinear, Part
from veneer.adapters.layers.site import Site
from veneer.adapters.runtime.forward import AdaptedForward
from veneer.adapters.runtime.forward_pass import ForwardPass
from veneer.adapters.runtime.layer import AdaptedLayer, AdapterAtSite, adapter_at
from veneer.adapters.runtime.plan import Assignment
from veneer.adapters.runtime.runtime import Runtime
from veneer.kernels.experts import Pairs
from veneer.kernels.lora.by_group import low_rank_by_group
from veneer.kernels.lora.dropout import Dropout, drop
from veneer.kernels.lora.reference import magnitude_change


@dataclass(frozen=True, eq=False)
class PairGroup:
    """Pairs of one expert that use one adapter.

    rows: their rows [n] among all pairs. weight: the adapter's weight in its mix, a float or a tensor [n].
    """

    adapter: str
    expert: int
    rows: Tensor
    weight: float | Tensor


@dataclass(frozen=True, eq=False)
class ExpertTerm:
    """A group at one projection: the adapter there, its dropout and its magnitude scale S [out], None for 1."""

    group: PairGroup
    layer: AdaptedLayer
    at: AdapterAtSite
    dropout: Dropout | None
    scale: Tensor | None


class AdaptedExperts(AdaptedForward):
    """The forward of the module at a stack of experts while adapters act on some of its projections.

    Attributes:
        members: the adapted projections by (expert, part).
    """

    def __init__(self, site: Site, runtime: Runtime, inner: Callable[..., Tensor] | None) -> None:
        super().__init__(site, runtime, inner)
        self.members: dict[tuple[int, str], AdaptedLayer] = {}

    def admit(self, site: Site, adapter: Adapter) -> None:
        """Let an adapter act at one projection of the stack."""
        key = _key(site)
        member = self.members.get(key)
        if member is None:
            member = self.members[key] = AdaptedLayer(site, self.runtime, None)
        self.adapters[adapter.name] = member.adapters[adapter.name] = adapter_at(adapter, site)
        kind: Any = self.site.layer_kind
        adapter.expert_tokens.setdefault(self.site.name, torch.zeros(kind.count(self.site.module), dtype=torch.long))

    def release(self, site: Site, name: str) -> None:
        """Take an adapter off one projection of the stack."""
        member = self.members.get(_key(site))
        if member is None:
            return
        member.adapters.pop(name, None)
        if not member.adapters:
            del self.members[_key(site)]
        if not any(name in other.adapters for other in self.members.values()):
            self.adapters.pop(name, None)

    def _output(self, current: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        plan, site = current.plan, self.site
        kind: Any = site.layer_kind
        if not any(name in self.adapters for name in plan.adapters):
            return self.base_call(*args, **kwargs)
        x, *routing = (*args, *kwargs.values())
        assignments = plan.uniform
        if assignments is None:
            assignments = plan.assignments(kind.batch_shape(site.module, x), x.device, site)
        acting = [one for one in assignments if one.adapter in self.adapters]
        if not acting:
            return self.base_call(*args, **kwargs)
        groups: list[PairGroup] = []

        def change(parts: Sequence[Part], x_SK: Tensor, y_SO: Tensor, pairs: Pairs) -> Tensor:
            if not groups:
                groups.extend(self._groups(current, acting, pairs))
            return self._changed(current, groups, parts, x_SK, y_SO)

        out: Tensor = kind.forward(site.module, change, x, *routing)
        return out

    def _groups(self, current: ForwardPass, assignments: Sequence[Assignment], pairs: Pairs) -> list[PairGroup]:
        """The groups of a call, and the count of each adapter's tokens by expert."""
        found: list[PairGroup] = []
        experts = len(pairs.sizes)
        counts = torch.is_grad_enabled() and current.lasting
        for one in assignments:
            if one.tokens is None:
                member_S = (pairs.tokens >= 0) & (pairs.experts < experts)
                place_S = pairs.tokens
            else:
                # The last entry stands for pairs without a token.
                place = torch.full((pairs.total + 1,), -1, device=pairs.tokens.device)
                place[one.tokens] = torch.arange(len(one.tokens), device=place.device)
                place_S = place[pairs.tokens]
                member_S = (place_S >= 0) & (pairs.experts < experts)
            rows = member_S.nonzero().squeeze(1)
            sizes = torch.bincount(pairs.experts[rows], minlength=experts)
            if counts:
                self._count(one.adapter, sizes)
            weight = one.weight[place_S[rows]] if isinstance(one.weight, Tensor) else one.weight
            start = 0
            for expert, size in enumerate(sizes.tolist()):
                if size:
                    part = slice(start, start + size)
                    found.append(
                        PairGroup(
                            one.adapter, expert, rows[part], weight[part] if isinstance(weight, Tensor) else weight
                        )
                    )
                    start += size
        return found

    def _count(self, name: str, sizes_E: Tensor) -> None:
        """Add a call's tokens by expert to what an adapter was trained on."""
        adapter = self.adapters[name].adapter
        adapter.expert_tokens[self.site.name] = adapter.expert_tokens[self.site.name] + sizes_E.cpu()

    def _changed(
        self, current: ForwardPass, groups: Sequence[PairGroup], parts: Sequence[Part], x_SK: Tensor, y_SO: Tensor
    ) -> Tensor:
        """The output of a fused parameter with the adapters' changes."""
        outputs, changed = [], False
        for part in parts:
            y_So = y_SO[:, part.columns]
            terms = [term for group in groups if (term := self._term(current, group, part)) is not None]
            changed |= bool(terms)
            outputs.append(_with_terms(terms, x_SK, y_So) if terms else y_So)
        if not changed:
            return y_SO
        if len(parts) == 1:
            return outputs[0]
        interleaved = parts[0].columns.step is not None
        return torch.stack(outputs, 2).flatten(1) if interleaved else torch.cat(outputs, 1)

    def _term(self, current: ForwardPass, group: PairGroup, part: Part) -> ExpertTerm | None:
        layer = self.members.get((group.expert, part.name))
        at = None if layer is None else layer.adapters.get(group.adapter)
        if layer is None or at is None or at.tensors is None:
            return None
        norm = layer.norm(current, at)
        scale = None if norm is None else at.adapter.method.magnitude_scale(at.tensors, norm)
        return ExpertTerm(group, layer, at, layer.dropout(current, at.adapter), scale)


def _with_terms(terms: Sequence[ExpertTerm], x_SK: Tensor, y_So: Tensor) -> Tensor:
    """A projection's output with the changes of all its groups."""
    rows = torch.cat([term.group.rows for term in terms])
    sizes = [len(term.group.rows) for term in terms]
    x_nK = x_SK.index_select(0, rows)
    if any(term.dropout is not None for term in terms):
        pieces = zip(x_nK.split(sizes), terms, strict=True)
        x_nK = torch.cat([x if term.dropout is None else drop(x, *term.dropout) for x, term in pieces])
    factors = [(term.at.tensors[term.at.a], term.at.tensors[term.at.b]) for term in terms if term.at.tensors]
    change_no = low_rank_by_group(x_nK, sizes, factors, [term.at.scale for term in terms])
    if any(term.scale is not None for term in terms):
        change_no = _scaled(terms, sizes, x_nK, y_So.index_select(0, rows), change_no)
    if any(not isinstance(term.group.weight, float) or term.group.weight != 1.0 for term in terms):
        change_no = change_no * torch.cat([_weights(term, change_no) for term in terms]).unsqueeze(1)
    return y_So.index_add(0, rows, change_no.to(y_So.dtype))


def _scaled(terms: Sequence[ExpertTerm], sizes: Sequence[int], x_nK: Tensor, y_no: Tensor, change_no: Tensor) -> Tensor:
    """The changes with their magnitude scales: S change + (S - 1) (y - b), for the groups that have one."""
    pieces = []
    columns = zip(terms, x_nK.split(sizes), y_no.split(sizes), change_no.split(sizes), strict=True)
    for term, x, y, change in columns:
        if term.scale is None:
            pieces.append(change)
            continue
        module: Any = term.layer.site.module
        if term.dropout is not None and term.at.drops_base_product:
            product = F.linear(x, term.layer.site.weight_2d.to(x.dtype))
        else:
            product = y if module.bias is None else y - module.bias.detach()
        pieces.append(change * term.scale.to(change.dtype) + magnitude_change(product, term.scale))
    return torch.cat(pieces)


def _weights(term: ExpertTerm, like: Tensor) -> Tensor:
    weight = term.group.weight
    if isinstance(weight, Tensor):
        return weight.to(like.dtype)
    return like.new_full((len(term.group.rows),), weight)


def _key(site: Site) -> tuple[int, str]:
    module = site.module
    assert isinstance(module, ExpertLinear)
    return module.expert, module.part.name
