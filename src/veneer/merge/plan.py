"""The plan of a merge: the changes of each stored weight, and the shared weights that must be untied.

A weight that two modules share (a tied embedding and head) stays shared where both are changed in the same way: by an adapter that acts on
both through the same factors, or by the same replacement. Otherwise each module gets a copy.

Low-rank deltas, replaced weights and biases, and token rows have one interface: a function that gives the change of some rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import factors_2d
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.checkpoints.base_files import Skeleton, as_2d
from veneer.errors import ComposeError

Mix = Sequence[tuple[Adapter, float]]


class WeightChange(Protocol):
    """One adapter's change of a weight."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two changes that do the same to two modules."""
        ...

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        """The change of some rows of a weight [out, in]; ``weight_OK`` holds these rows, and the first is row ``start``."""
        ...


@dataclass(frozen=True)
class LowRankChange:
    """The delta of an adapter at a site; ``flipped`` where a tied head takes the embedding's delta transposed."""

    adapter: Adapter
    site: str
    weight: float
    flipped: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.adapter), self.site, self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        tensors = {key: value.detach() for key, value in self.adapter.tensors[self.site].items()}
        rows, scale = slice(start, start + weight_OK.shape[0]), self.adapter.scale(self.site)
        if self.flipped:
            a, b = factors_2d(tensors, weight_OK.dtype)
            return self.weight * scale * (a.T[rows] @ b.T)
        method = self.adapter.method
        return self.weight * method.delta(method.output_rows(tensors, rows), scale, weight_OK)


@dataclass(frozen=True)
class Replacement:
    """A weight or bias that replaces the base's, seen as [out, in]."""

    parameter: Tensor
    value_OK: Tensor
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.parameter), self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        return self.weight * (self.value_OK[start : start + weight_OK.shape[0]].to(weight_OK) - weight_OK)


@dataclass(frozen=True)
class AddedVector:
    """A vector that is added to the base's: the bias of B."""

    value_O1: Tensor
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.value_O1), self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        return self.weight * self.value_O1[start : start + weight_OK.shape[0]].to(weight_OK)


@dataclass(frozen=True)
class TokenRows:
    """Replaced rows of some tokens: rows of a head's weight [vocab, dim], columns of an embedding's seen as [dim, vocab]."""

    rows_nD: Tensor
    tokens: tuple[int, ...]
    columns: bool
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.rows_nD), self.tokens, self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        change = torch.zeros_like(weight_OK)
        stop = start + weight_OK.shape[0]
        if self.columns:
            ids = list(self.tokens)
            change[:, ids] = self.rows_nD.detach().T[start:stop].to(weight_OK) - weight_OK[:, ids]
        else:
            for row, token in zip(self.rows_nD.detach(), self.tokens, strict=True):
                if start <= token < stop:
                    change[token - start] = row.to(weight_OK) - weight_OK[token - start]
        return self.weight * change


@dataclass(frozen=True)
class MergedTensor:
    """One tensor to write: its name in the new files, the site or parameter that reads it, the layer's kind ("vector" for biases and
    norms) and its changes."""

    key: str
    site: str
    kind: str = ""
    changes: tuple[WeightChange, ...] = ()


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
        for name in adapter.tensors:
            changes.setdefault(name, []).append(LowRankChange(adapter, name, weight))
            for other in base.survey.tied.get(name, ()):
                if adapter.follows_at(base.sites[other]) and base.sites[other].tied_to == name:
                    changes.setdefault(other, []).append(LowRankChange(adapter, name, weight, flipped=True))
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
            changes.setdefault(module, []).append(Replacement(parameter, as_2d(value, site.kind), weight))
        elif site is not None and key == ROWS:
            columns = site.kind == "embedding"
            changes.setdefault(module, []).append(TokenRows(parameter, adapter.tokens[module], columns, weight))
        else:
            added = key == LORA_BIAS
            name = f"{module}.{BIAS if added else key}"
            stored = base.parameter_key(name)
            if stored is None:
                raise ComposeError(
                    f'the base has no "{name}", so the adapter "{adapter.name}" has a value for it that cannot be merged'
                )
            scale = adapter.scale(module) if added else 1.0
            change: WeightChange = (
                AddedVector(value.unsqueeze(1) * scale, weight)
                if added
                else Replacement(parameter, value.unsqueeze(1), weight)
            )
            vectors.setdefault(stored, []).append(change)


def _matrices(
    changes: Mapping[str, list[WeightChange]], base: Skeleton
) -> tuple[dict[str, tuple[MergedTensor, ...]], list[tuple[str, ...]], set[str]]:
    tensors: dict[str, tuple[MergedTensor, ...]] = {}
    untied: list[tuple[str, ...]] = []
    replaced: set[str] = set()
    for site in changes:
        key = base.key(site)
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
            MergedTensor(
                base.names.get(f"{member}.weight", f"{member}.weight"), member, base.sites[member].kind, members[member]
            )
            for member in group
            if member != owner
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
