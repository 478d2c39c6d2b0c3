"""What a merge writes: which changes go into which stored weight, and which shared weights come apart.

A weight that two modules share (a tied embedding and head) stays one where both are changed alike, or by an adapter that acts on
both sides through the same factors, or the same tensor of its own. Otherwise each module gets its own.

Low-rank changes, weights, biases and rows of an adapter's own are sources of one kind: a function that gives the change of some rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods.lora import factors_2d
from veneer.adapters.overrides import BIAS, LORA_BIAS, ROWS, WEIGHT
from veneer.checkpoints.base_files import Skeleton, as_2d
from veneer.errors import ComposeError

Mix = Sequence[tuple[Adapter, float]]


class Source(Protocol):
    """One adapter's part in a weight."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two sources that change two modules alike."""
        ...

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        """The change of the rows that begin at ``start`` of a weight [out, in], given these rows of it."""
        ...


@dataclass(frozen=True)
class LowRank:
    """A low-rank change, DoRA's gain included; ``flipped`` where a tied head takes the embedding's change transposed."""

    adapter: Adapter
    site: str
    weight: float
    flipped: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.adapter), self.site, self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        # every row depends on its own factors alone
        own: dict[str, Tensor] = {key: value.detach() for key, value in self.adapter.tensors[self.site].items()}
        stop = start + weight_OK.shape[0]
        method = self.adapter.method
        if not method.needs_base_weights:
            a, b = factors_2d(own, weight_OK.dtype)
            left, right = (a.T, b.T) if self.flipped else (b, a)
            return (self.weight * self.adapter.scale(self.site)) * (left[start:stop] @ right)
        part = {
            key: value[start:stop] if key not in ("lora_A", "lora_embedding_A") else value for key, value in own.items()
        }
        return self.weight * (method.merged(weight_OK, part, self.adapter.scale(self.site)) - weight_OK)


@dataclass(frozen=True)
class Whole:
    """A weight or bias of the adapter's own in the place of the base's, seen as [out, in]."""

    own: Tensor
    own_OK: Tensor
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.own), self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        return self.weight * (self.own_OK[start : start + weight_OK.shape[0]].to(weight_OK) - weight_OK)


@dataclass(frozen=True)
class Added:
    """A vector that is added to the base's: a bias of B."""

    own_O1: Tensor
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.own_O1), self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        return self.weight * self.own_O1[start : start + weight_OK.shape[0]].to(weight_OK)


@dataclass(frozen=True)
class Rows:
    """Rows of some tokens: rows of a head's weight [vocab, dim], columns of an embedding's seen as [dim, vocab]."""

    own_nD: Tensor
    tokens: tuple[int, ...]
    columns: bool
    weight: float

    @property
    def identity(self) -> tuple[object, ...]:
        return (id(self.own_nD), self.tokens, self.weight)

    def rows(self, weight_OK: Tensor, start: int) -> Tensor:
        change = torch.zeros_like(weight_OK)
        stop = start + weight_OK.shape[0]
        if self.columns:
            ids = list(self.tokens)
            change[:, ids] = self.own_nD.detach().T[start:stop].to(weight_OK) - weight_OK[:, ids]
        else:
            for row, token in zip(self.own_nD.detach(), self.tokens, strict=True):
                if start <= token < stop:
                    change[token - start] = row.to(weight_OK) - weight_OK[token - start]
        return self.weight * change


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name in the new files, the site or place that reads it, the layer's kind ("vector" for biases and norms)
    and the changes in it."""

    key: str
    site: str
    kind: str = ""
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is written. pieces: by name in the base's files. untied: groups that come apart. replaced: names in the base's files that are
    written from another's tensor instead."""

    pieces: Mapping[str, tuple[Piece, ...]]
    untied: tuple[tuple[str, ...], ...]
    replaced: frozenset[str]


def plan_merge(mix: Mix, base: Skeleton) -> Plan:
    """What is written from each stored tensor that an adapter changes.

    Raises ComposeError for values that the base has no tensor for, and where an encoder-decoder would come apart.
    """
    changes: dict[str, list[Source]] = {}
    vectors: dict[str, list[Source]] = {}
    for adapter, weight in mix:
        for name in adapter.tensors:
            changes.setdefault(name, []).append(LowRank(adapter, name, weight))
            for other in base.survey.tied.get(name, ()):
                if adapter.follows_at(base.sites[other]) and base.sites[other].tied_to == name:
                    changes.setdefault(other, []).append(LowRank(adapter, name, weight, flipped=True))
        for place in adapter.overrides:
            _own_sources(adapter, place, weight, base, changes, vectors)
    pieces, untied, replaced = _matrices(changes, base)
    for key, sources in vectors.items():
        pieces[key] = (Piece(key, key, "vector", tuple(sources)),)
    if untied:
        _copy_what_else_is_shared(base, pieces)
    return Plan(pieces, tuple(untied), frozenset(replaced))


def _own_sources(
    adapter: Adapter,
    place: str,
    weight: float,
    base: Skeleton,
    changes: dict[str, list[Source]],
    vectors: dict[str, list[Source]],
) -> None:
    site = base.sites.get(place)
    for key, own in adapter.overrides[place].items():
        value = own.detach()
        if site is not None and key == WEIGHT:
            changes.setdefault(place, []).append(Whole(own, as_2d(value, site.kind), weight))
        elif site is not None and key == ROWS:
            columns = site.kind == "embedding"
            changes.setdefault(place, []).append(Rows(own, adapter.tokens[place], columns, weight))
        else:
            added = key == LORA_BIAS
            name = f"{place}.{BIAS if added else key}"
            stored = base.parameter_key(name)
            if stored is None:
                raise ComposeError(
                    f'the base has no "{name}", which the adapter "{adapter.name}" has, so there is no tensor to merge it into'
                )
            scale = adapter.scale(place) if added else 1.0
            source: Source = (
                Added(value.unsqueeze(1) * scale, weight) if added else Whole(own, value.unsqueeze(1), weight)
            )
            vectors.setdefault(stored, []).append(source)


def _matrices(
    changes: Mapping[str, list[Source]], base: Skeleton
) -> tuple[dict[str, tuple[Piece, ...]], list[tuple[str, ...]], set[str]]:
    pieces: dict[str, tuple[Piece, ...]] = {}
    untied: list[tuple[str, ...]] = []
    replaced: set[str] = set()
    for site in changes:
        key = base.key(site)
        if key in pieces:
            continue
        group = base.survey.tied.get(site, (site,))
        members = {member: tuple(changes.get(member, ())) for member in group}
        shared = {tuple(source.identity for source in sources) for sources in members.values()}
        owner = base.owner(site)
        if len(shared) == 1:
            pieces[key] = (Piece(key, owner, base.sites[owner].kind, members[owner]),)
            continue
        if base.folder.config.get("is_encoder_decoder"):
            raise ComposeError(
                f"{' and '.join(group)} share one weight, and an encoder-decoder scales its logits only as long as they do; "
                "merge an adapter that leaves them alone"
            )
        untied.append(group)
        others = [
            Piece(
                base.names.get(f"{member}.weight", f"{member}.weight"), member, base.sites[member].kind, members[member]
            )
            for member in group
            if member != owner
        ]
        replaced |= {piece.key for piece in others} & set(base.folder.files)
        pieces[key] = (Piece(key, owner, base.sites[owner].kind, members[owner]), *others)
    return pieces, untied, replaced


def _copy_what_else_is_shared(base: Skeleton, pieces: dict[str, tuple[Piece, ...]]) -> None:
    """One setting ties everything, so parameters that are shared and unchanged (BERT's output bias) need a copy for each name too."""
    groups: dict[int, list[str]] = {}
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    written = {piece.key for made in pieces.values() for piece in made}
    for names in groups.values():
        stored = [base.names[name] for name in names if name in base.names]
        lacking = [name for name in names if name not in base.names and name not in written]
        if stored and lacking:
            made = pieces.get(stored[0], (Piece(stored[0], ""),))
            pieces[stored[0]] = (*made, *(replace(made[0], key=name) for name in lacking))
