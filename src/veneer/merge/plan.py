"""The plan of a merge: the changes of each stored weight, and the shared weights that must be untied.

A weight that two modules share (a tied embedding and head) stays shared where both are changed in the same way: by an adapter that acts on
both through the same factors, or by the same replacement. Otherwise each module gets a copy.

Low-rank deltas, replaced weights and biases, and token rows have one interface: a function that gives the change of some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.merge import check_mergeable
from veneer.adapters.methods import factors_2d
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.checkpoints.base_files import Skeleton, as_2d
from veneer.errors import ComposeError

Mix = Sequence[tuple[Adapter, float]]


@dataclass(frozen=True)
class WeightChange:
    """One adapter's change of a weight.

    Attributes:
        identity: equal for two changes that do the same to two modules.
        rows: the change of some rows of a weight [out, in], from these rows and the index of the first.
        value: the new rows themselves, from the first index and the one behind the last, where the change replaces them.
    """

    identity: tuple[object, ...]
    rows: Callable[[Tensor, int], Tensor]
    value: Callable[[int, int], Tensor] | None = None


def _low_rank_change(adapter: Adapter, site: str, weight: float, *, transposed: bool = False) -> WeightChange:
    """The delta of an adapter at a site; ``transposed`` where a tied head takes the embedding's."""
    tensors = {key: value.detach() for key, value in adapter.tensors[site].items()}
    method, scale = adapter.method, adapter.scale(site)

    def rows(weight_OK: Tensor, start: int) -> Tensor:
        chosen = slice(start, start + len(weight_OK))
        if transposed:
            a, b = factors_2d(tensors, weight_OK.dtype)
            return weight * scale * (a.T[chosen] @ b.T)
        return weight * method.delta(method.output_rows(tensors, chosen), scale, weight_OK)

    return WeightChange((id(adapter), site, weight), rows)


def _replacement(parameter: Tensor, value_OK: Tensor, weight: float) -> WeightChange:
    """A weight or bias that replaces the base's; ``value_OK`` is the parameter seen as [out, in]."""

    def rows(weight_OK: Tensor, start: int) -> Tensor:
        return weight * (value_OK[start : start + len(weight_OK)].to(weight_OK) - weight_OK)

    value = (lambda start, stop: value_OK[start:stop]) if weight == 1 else None
    return WeightChange((id(parameter), weight), rows, value)


def _added_vector(value_O: Tensor, weight: float) -> WeightChange:
    """A vector that is added to the base's: the bias of B."""

    def rows(weight_OK: Tensor, start: int) -> Tensor:
        return weight * value_O.unsqueeze(1)[start : start + len(weight_OK)].to(weight_OK)

    return WeightChange((id(value_O), weight), rows)


def _token_rows(rows_nD: Tensor, tokens: tuple[int, ...], weight: float, *, columns: bool) -> WeightChange:
    """Replaced rows of some tokens: rows of a head's weight [vocab, dim], columns of an embedding's seen as [dim, vocab]."""
    values_nD, ids = rows_nD.detach(), list(tokens)

    def rows(weight_OK: Tensor, start: int) -> Tensor:
        change, stop = torch.zeros_like(weight_OK), start + len(weight_OK)
        if columns:
            change[:, ids] = values_nD.T[start:stop].to(weight_OK) - weight_OK[:, ids]
        else:
            for row, token in zip(values_nD, ids, strict=True):
                if start <= token < stop:
                    change[token - start] = row.to(weight_OK) - weight_OK[token - start]
        return weight * change

    return WeightChange((id(rows_nD), tokens, weight), rows)


def _bias_change(adapter: Adapter, site: str, weight: float) -> WeightChange:
    """The change of a layer's bias by the adapter's own tensors there."""
    tensors = {key: value.detach() for key, value in adapter.tensors[site].items()}

    def rows(bias_O1: Tensor, start: int) -> Tensor:
        some = adapter.method.output_rows(tensors, slice(start, start + len(bias_O1)))
        change = adapter.method.bias_delta(some, bias_O1.squeeze(1))
        return torch.zeros_like(bias_O1) if change is None else weight * change.unsqueeze(1).to(bias_O1)

    return WeightChange((id(adapter), site, "bias", weight), rows)


@dataclass(frozen=True)
class MergedTensor:
    """One tensor to write: its name in the new files, the site or parameter that reads it, the layer's kind ("vector" for biases and
    norms) and its changes. A stack of experts has the changes of each of its sites in ``experts``."""

    key: str
    site: str
    kind: str = ""
    changes: tuple[WeightChange, ...] = ()
    experts: Mapping[str, tuple[WeightChange, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MergePlan:
    """The tensors to write. tensors: by name in the base's files. untied: groups that no longer share a weight. replaced: names in the
    base's files that are written from another tensor instead."""

    tensors: Mapping[str, tuple[MergedTensor, ...]]
    untied: tuple[tuple[str, ...], ...]
    replaced: frozenset[str]


def plan_merge(mix: Mix, base: Skeleton) -> MergePlan:
    """Plan which tensors are written from each stored tensor that an adapter changes.

    Raises:
        ComposeError: an adapter has values that the base has no tensor for, or the weights of an encoder-decoder would be untied.
    """
    changes: dict[str, list[WeightChange]] = {}
    vectors: dict[str, list[WeightChange]] = {}
    for adapter, weight in mix:
        check_mergeable(adapter)
        for name in adapter.tensors:
            if adapter.method.changes_biases and (stored := base.parameter_key(f"{name}.{BIAS}")) is not None:
                vectors.setdefault(stored, []).append(_bias_change(adapter, name, weight))
            changes.setdefault(name, []).append(_low_rank_change(adapter, name, weight))
            for other in base.survey.tied.get(name, ()):
                if adapter.follows_at(base.sites[other]) and base.sites[other].tied_to == name:
                    changes.setdefault(other, []).append(_low_rank_change(adapter, name, weight, transposed=True))
        for name in adapter.overrides:
            _add_overrides(adapter, name, weight, base, changes, vectors)
    tensors, untied, replaced = _matrices(changes, base)
    for key, added in vectors.items():
        tensors[key] = (MergedTensor(key, key, "vector", tuple(added)),)
    if untied:
        _copy_other_shared(base, tensors)
    return MergePlan(tensors, tuple(untied), frozenset(replaced))


def _add_overrides(
    adapter: Adapter,
    module: str,
    weight: float,
    base: Skeleton,
    changes: dict[str, list[WeightChange]],
    vectors: dict[str, list[WeightChange]],
) -> None:
    site = base.sites.get(module)
    for key, parameter in adapter.overrides[module].items():
        value = parameter.detach()
        if site is not None and key == WEIGHT:
            changes.setdefault(module, []).append(_replacement(parameter, as_2d(value, site.kind), weight))
            continue
        if site is not None and key == ROWS:
            rows = _token_rows(parameter, adapter.tokens[module], weight, columns=site.kind == "embedding")
            changes.setdefault(module, []).append(rows)
            continue
        name = f"{module}.{BIAS if key == LORA_BIAS else key}"
        stored = base.parameter_key(name)
        if stored is None:
            raise ComposeError(
                f'the base has no "{name}", so the adapter "{adapter.name}" has a value for it that cannot be merged'
            )
        if key == LORA_BIAS:
            change = _added_vector(value * adapter.scale(module), weight)
        else:
            change = _replacement(parameter, value.unsqueeze(1), weight)
        vectors.setdefault(stored, []).append(change)


def _matrices(
    changes: Mapping[str, list[WeightChange]], base: Skeleton
) -> tuple[dict[str, tuple[MergedTensor, ...]], list[tuple[str, ...]], set[str]]:
    tensors: dict[str, tuple[MergedTensor, ...]] = {}
    untied: list[tuple[str, ...]] = []
    replaced: set[str] = set()
    for site in changes:
        key = base.key(site)
        if base.stacked(site):
            known = tensors.get(key, (MergedTensor(key, base.sites[site].parameter),))[0]
            tensors[key] = (replace(known, experts={**known.experts, site: tuple(changes[site])}),)
            continue
        if key in tensors:
            continue
        group = base.survey.tied.get(site, (site,))
        members = {member: tuple(changes.get(member, ())) for member in group}
        distinct = {tuple(change.identity for change in member) for member in members.values()}
        owner = base.owner(site)
        if len(distinct) == 1:
            tensors[key] = (MergedTensor(key, owner, base.sites[owner].kind, members[owner]),)
            continue
        if base.folder.config.get("is_encoder_decoder"):
            raise ComposeError(
                f"{' and '.join(group)} share one weight, and an encoder-decoder scales its logits only while they do; "
                "merge an adapter that does not change them"
            )
        untied.append(group)
        others = [
            MergedTensor(base.names.get(f"{name}.weight", f"{name}.weight"), name, base.sites[name].kind, members[name])
            for name in group
            if name != owner
        ]
        replaced |= {other.key for other in others} & set(base.folder.files)
        tensors[key] = (MergedTensor(key, owner, base.sites[owner].kind, members[owner]), *others)
    return tensors, untied, replaced


def _copy_other_shared(base: Skeleton, tensors: dict[str, tuple[MergedTensor, ...]]) -> None:
    """Give unchanged shared parameters (BERT's output bias) a copy for each name: one setting unties all of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    written = {tensor.key for group in tensors.values() for tensor in group}
    for names in groups.values():
        stored = [base.names[name] for name in names if name in base.names]
        lacking = [name for name in names if name not in base.names and name not in written]
        if stored and lacking:
            group = tensors.get(stored[0], (MergedTensor(stored[0], ""),))
            tensors[stored[0]] = (*group, *(replace(group[0], key=name) for name in lacking))
