"""Checks of a folder that has been placed: its settings against its tensors, then its numbers.

PEFT builds layers from the settings and then fills in what the file has: a missing tensor leaves a layer at its random start, a surplus one
is dropped or lands on the base. Here the tensors decide, and a disagreement is refused.

Numbers are checked before they are kept, a piece at a time through one buffer that stays in the processor's cache:

    x . x finite         every number of the piece is finite, and this is its share of the squared norm
    x . x not finite     only then is the piece read again, in fp64: numbers that are not finite, or squares beyond fp32

So a refusal costs one pass over the file and no memory. The numbers that are then kept are checked again, because the file may have
changed in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.checkpoints.base_view import BaseView, inside
from veneer.checkpoints.files import fill
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.patterns import PatternTable, layer_of, tails
from veneer.checkpoints.peft.placement import Placement
from veneer.checkpoints.peft.settings import NO_TARGETS, Settings
from veneer.checkpoints.peft.tensor_names import VECTORS
from veneer.checkpoints.tensors import DTYPES, Entry, Header

T = TypeVar("T")
MAX_TRIES = 1_000_000
"""Patterns times sites."""
MAX_SCALE = 1e4
MAX_CHANGE = 1e6
MIN_CHANGE = 1e-9
"""A change with a smaller norm is lost in the rounding of any base weight."""
_PIECE = 512 << 10


def check_agreement(placement: Placement, settings: Settings, base: BaseView, found: Findings) -> None:
    """Compare the sites and ranks of the tensors with what the settings ask for, and fill in ``placement.alphas``."""
    _check_patterns(placement, settings, base, found)
    targets = [] if settings.target_modules == NO_TARGETS else settings.target_modules
    if isinstance(targets, str):
        if targets.lower() != "all-linear":
            found.note(
                f'target_modules is an expression ("{shown(targets, 60)}"), which is not evaluated: its tensors say that the adapter '
                f"has {len(placement.ranks)} sites"
            )
    elif targets is not None:
        _check_targets(placement, targets, settings, base, found)


def _of_either(table: PatternTable[T], name: str, site: str, default: T, base: BaseView) -> tuple[T, list[str]]:
    """The value for a layer under its name in the file or, for a layer that was renamed since, under today's."""
    missing: Any = None
    value, unclear = table.get(name, missing)
    if value is None and not base.is_expert(site):
        value, unclear = table.get(site, missing)
    return (default if value is None else value), unclear


def _check_patterns(placement: Placement, settings: Settings, base: BaseView, found: Findings) -> None:
    ranks, alphas = PatternTable(settings.rank_pattern), PatternTable(settings.alpha_pattern)
    if (len(ranks.tried) + len(alphas.tried)) * len(placement.ranks) > MAX_TRIES:
        found.refuse(
            "rank_pattern and alpha_pattern hold too many patterns; write full layer names as ^model\\\\.layers\\\\.0..."
        )
        return
    wrong: dict[tuple[int, int], list[str]] = {}
    unread: dict[str, None] = {}
    for site, rank in placement.ranks.items():
        name = placement.named.get(site, site)
        declared, unclear = _of_either(ranks, name, site, settings.r, base)
        if unclear:
            found.note(f'rank_pattern: "{shown(unclear[0], 60)}" is not evaluated; ranks are those of the tensors')
        elif declared != rank:
            wrong.setdefault((declared, rank), []).append(site)
        placement.alphas[site], unclear = _of_either(alphas, name, site, settings.lora_alpha, base)
        unread |= dict.fromkeys(unclear[:1])
    for pattern in unread:
        found.refuse(
            f'alpha_pattern: "{shown(pattern, 60)}" needs a regular expression, which is not evaluated, and lora_alpha cannot be read '
            "from tensors; write the full names of the layers instead"
        )
    for (declared, rank), sites in wrong.items():
        found.refuse(
            f"adapter_config.json declares rank {declared:,} at {listed(sites, 2)}; the tensors have rank {rank:,}"
        )


def _check_targets(
    placement: Placement, targets: list[str], settings: Settings, base: BaseView, found: Findings
) -> None:
    names, ranks = frozenset(targets), placement.sites
    parameters = {name.rpartition(".")[0] for name in settings.target_parameters or ()}
    meant = names | {*parameters, *(settings.target_parameters or ())}
    named = {site: placement.named.get(site, site) for site in ranks}
    stray = [site for site in ranks if meant.isdisjoint((*tails(site), *tails(named[site])))]
    if settings.ensure_weight_tying:
        # The head that follows an embedding is not named; its tensors show whether it follows.
        stray = [site for site in stray if base.sites and base.tied_to(site) is None]
    if stray:
        found.refuse(
            f"target_modules in adapter_config.json does not name {listed(stray)}, which the file has tensors for",
            "config",
        )
    # PEFT has no modules inside of stacks: names without a tensor there mean layers elsewhere.
    stacks = {id(base.sites[site].stack) for site in ranks if site in base.sites}
    asked = [
        site.name
        for site in base.sites.values()
        if not site.reason
        and (site.stack is None or id(site.stack) in stacks)
        and any(
            _asked_for(path, names if site.stack is not None else names | parameters, settings)
            for path in {site.name, base.written_name(site.name)}
        )
    ]
    missing = [name for name in asked if name not in ranks]
    if missing:
        found.refuse(
            f"target_modules in adapter_config.json names {listed(missing)}, which the file has no tensors for: it is incomplete",
            "config",
        )
    idle = names.difference(*(tails(name) for name in named.values())) if not base.sites else ()
    if idle:
        found.note(f"target_modules names {listed(sorted(idle))}, which the file has no tensors for")


def _asked_for(path: str, targets: frozenset[str], settings: Settings) -> bool:
    """PEFT would adapt this layer by these settings."""
    if targets.isdisjoint(tails(path)):
        return False
    excluded = settings.exclude_modules
    if isinstance(excluded, str) or not set(tails(path)).isdisjoint(excluded or ()):
        # An expression is not evaluated; layers that it leaves out cannot be told from missing ones.
        return False
    if any(inside(path, name) for name in settings.modules_to_save or ()):
        return False
    layers, patterns = settings.layers_to_transform, settings.layers_pattern
    if layers is None or layers == []:
        return True
    names: list[str | None] = [patterns] if isinstance(patterns, str) else [*(patterns or [])] or [None]
    number = next((found for name in names if (found := layer_of(path, name or None)) is not None), None)
    return number in ([layers] if isinstance(layers, int) else layers)


# Numbers


@dataclass(frozen=True)
class Sums:
    """Sums over the numbers of a tensor.

    Attributes:
        count: how many numbers there are.
        bad: how many of them are not finite.
        squares: the sum of the squares of the pieces that are finite throughout.
    """

    count: int = 0
    bad: int = 0
    squares: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.bad + other.bad, self.squares + other.squares)

    @property
    def norm(self) -> float:
        """The norm, if all numbers are finite."""
        return math.sqrt(self.squares)


_SumsByLayer = Mapping[str, Mapping[str, Sums]]


def check_stored(
    file: BinaryIO, header: Header, placement: Placement, settings: Settings, where: str, found: Findings
) -> None:
    """Refuse a file for its numbers, before any of them is kept."""
    scales = {site: settings.scaling(rank, placement.alphas[site]) for site, rank in placement.ranks.items()}
    both = (placement.sites, placement.overrides)
    entries = [entry for table in both for held in table.values() for entry in held.values()]
    sums = sums_of_stored(file, header, entries, where)
    factors, overrides = (
        {layer: {key: sums[entry.name] for key, entry in entries.items()} for layer, entries in table.items()}
        for table in both
    )
    _refuse(factors, overrides, scales, found)


def check_values(adapter: Adapter, found: Findings) -> None:
    """The same checks of tensors in memory, and notes on unusual ones: zero changes, magnitudes that are not positive."""
    factors, overrides = (
        {layer: {key: sums_of(value) for key, value in values.items()} for layer, values in table.items()}
        for table in (adapter.tensors, adapter.overrides)
    )
    _refuse(factors, overrides, {site: adapter.scale(site) for site in factors}, found)
    sizes = {site: _change(parts, adapter.scale(site)) for site, parts in factors.items()}
    zero = sum(size <= MIN_CHANGE for size in sizes.values())
    for site, tensors in adapter.tensors.items():
        magnitude = adapter.method.magnitude(tensors)
        if magnitude is not None and bool((magnitude <= 0).any()):
            count = int((magnitude <= 0).sum())
            found.note(f"{shown(site)}: {count:,} magnitudes are zero or negative, which training rarely yields")
    if zero and zero == len(factors):
        if any(sizes.values()):
            idle = (
                f"the change has a norm of at most {max(sizes.values()):.1e} at every site, so nothing that can be measured changes: "
                "factors that were scaled by mistake, or never trained?"
            )
        else:
            moved = "directions are those of the base" if adapter.method.needs_base_weights else "change is zero"
            idle = f"the {moved} at every site: an adapter that was never trained?"
        found.note(idle)
        adapter.meta["idle"] = idle
    elif zero:
        small = " or too small to be measured" if any(0 < size <= MIN_CHANGE for size in sizes.values()) else ""
        found.note(f"the change is zero{small} at {zero} of {len(factors)} sites")


def _refuse(factors: _SumsByLayer, overrides: _SumsByLayer, scales: Mapping[str, float], found: Findings) -> None:
    for table in (factors, overrides):
        for layer, parts in table.items():
            for key, sums in parts.items():
                if sums.bad:
                    found.refuse(f"{shown(layer)}.{key}: {sums.bad:,} of {sums.count:,} numbers are not finite")
    for site, parts in factors.items():
        if any(sums.bad for sums in parts.values()):
            continue
        scale = scales.get(site, 1.0)
        if abs(scale) > MAX_SCALE:
            found.refuse(
                f"{shown(site)}: the change is scaled by {scale:.3g}; at most {MAX_SCALE:.0e} is read", "scale"
            )
        elif not (size := _change(parts, scale)) <= MAX_CHANGE:
            found.refuse(f"{shown(site)}: the change has a norm of up to {size:.3g}", "scale")


def _change(parts: Mapping[str, Sums], scale: float) -> float:
    """A bound on the norm of the change at a site."""
    return abs(scale) * math.prod(sums.norm for key, sums in parts.items() if key not in VECTORS)


def sums_of_stored(file: BinaryIO, header: Header, entries: Iterable[Entry], where: str) -> dict[str, Sums]:
    """{tensor name: its sums} of these tensors of an open file, none of which is kept.

    Raises CheckpointError when the file ends early.
    """
    buffer = bytearray(_PIECE)
    view, typed = memoryview(buffer), {dtype: torch.frombuffer(buffer, dtype=dtype) for dtype in DTYPES.values()}
    found: dict[str, Sums] = {}
    for entry in entries:
        file.seek(header.start + entry.begin)
        total, left = Sums(), entry.end - entry.begin
        while left:
            size = min(left, _PIECE)
            fill(file, view[:size], where)
            total += _piece_sums(typed[entry.dtype][: size // entry.dtype.itemsize])
            left -= size
        found[entry.name] = total
    return found


def sums_of(value: Tensor) -> Sums:
    """The sums of a tensor."""
    return sum(map(_piece_sums, value.detach().reshape(-1).split(_PIECE // 4)), Sums())


def _piece_sums(flat: Tensor) -> Sums:
    wide = flat if flat.dtype == torch.float64 else flat.float()
    squares = float(torch.dot(wide, wide))
    if math.isfinite(squares) and (squares > 0 or all(float(end) == 0 for end in torch.aminmax(wide))):
        return Sums(flat.numel(), 0, squares)
    # Squares of numbers above 2e19 or below 1e-23 exceed fp32.
    finite = torch.isfinite(wide)
    bad = finite.numel() - int(finite.count_nonzero())
    if bad:
        return Sums(flat.numel(), bad, 0.0)
    kept = wide.double()
    return Sums(flat.numel(), 0, float(torch.dot(kept, kept)))
