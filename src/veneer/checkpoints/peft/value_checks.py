"""What only an adapter's numbers show: some that are not finite, a change out of all proportion, or of nothing.

A file is looked through before it is kept, a piece at a time through one buffer that stays in the processor's cache, with one product
for each piece:

    x . x finite         every number of the piece is finite, and this is its share of the squared norm
    x . x not finite     only then is the piece looked at again, in fp64: numbers that are not finite, or squares beyond fp32

So a refusal costs one pass over the file and no memory; what costs most in reading is not the bytes but fresh memory to keep them in.
What is then kept is looked at again, since the file may have changed in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.checkpoints.files import fill
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.peft.overrides_in import Whole
from veneer.checkpoints.peft.patterns import Table
from veneer.checkpoints.peft.placement import Plan
from veneer.checkpoints.peft.settings import Settings
from veneer.checkpoints.peft.tensor_names import MAGNITUDE
from veneer.checkpoints.tensors import DTYPES, Entry, Header

MAX_SCALE = 1e4
MAX_CHANGE = 1e6
_PIECE = 512 << 10


@dataclass(frozen=True)
class Sums:
    """count: how many numbers. bad: how many of them are not finite. squares: the sum of the squares, of pieces where all are finite."""

    count: int = 0
    bad: int = 0
    squares: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.bad + other.bad, self.squares + other.squares)

    @property
    def norm(self) -> float:
        """The norm, where all numbers are finite."""
        return math.sqrt(self.squares)


_Table = Mapping[str, Mapping[str, Sums]]


def look_through(file: BinaryIO, header: Header, entries: Iterable[Entry], where: str) -> dict[str, Sums]:
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
            total += _sums(typed[entry.dtype][: size // entry.dtype.itemsize])
            left -= size
        found[entry.name] = total
    return found


def check_stored(
    file: BinaryIO, header: Header, plan: Plan, whole: Whole, settings: Settings, where: str, found: Findings
) -> None:
    """Refuse what the numbers of a file forbid, before any of them is kept."""
    alphas = Table(settings.alpha_pattern)
    scales = {
        site: settings.scaling(rank, alphas.get(site, settings.lora_alpha)[0]) for site, rank in plan.ranks.items()
    }
    entries = [entry for table in (plan.sites, whole.own) for own in table.values() for entry in own.values()]
    sums = look_through(file, header, entries, where)
    factors, own = (
        {place: {key: sums[entry.name] for key, entry in parts.items()} for place, parts in table.items()}
        for table in (plan.sites, whole.own)
    )
    _refuse(factors, own, scales, found)


def check_values(adapter: Adapter, found: Findings) -> None:
    """The same of tensors in memory, and notes of what is unusual: changes of nothing, magnitudes that are not positive."""
    sums: dict[str, dict[str, Sums]] = {}
    for site, key, value in adapter.named_tensors():
        flat = value.detach().reshape(-1)
        sums.setdefault(site, {})[key] = sum(map(_sums, flat.split(_PIECE // 4)), Sums())
    factors = {site: {key: sums[site][key] for key in own} for site, own in adapter.tensors.items()}
    own = {
        place: {key: s for key, s in parts.items() if key in adapter.overrides.get(place, ())}
        for place, parts in sums.items()
    }
    _refuse(factors, own, {site: adapter.scale(site) for site in factors}, found)
    still = sum(any(s.norm == 0 for key, s in parts.items() if key != MAGNITUDE) for parts in factors.values())
    for site, tensors in adapter.tensors.items():
        magnitude = tensors.get(MAGNITUDE)
        if magnitude is not None and bool((magnitude <= 0).any()):
            found.note(
                f"{shown(site)}: {int((magnitude <= 0).sum()):,} magnitudes are zero or negative, which training rarely yields"
            )
    if still and still == len(factors):
        what = (
            "directions are those of the base at every site"
            if adapter.method.needs_base_weights
            else "change is zero at every site"
        )
        found.note(f"the {what}: an adapter that was never trained?")
    elif still:
        found.note(f"the change is zero at {still} of {len(factors)} sites")


def _refuse(factors: _Table, own: _Table, scales: Mapping[str, float], found: Findings) -> None:
    for table in (factors, own):
        for place, parts in table.items():
            for key, sums in parts.items():
                if sums.bad:
                    found.refuse(f"{shown(place)}.{key}: {sums.bad:,} of {sums.count:,} numbers are not finite")
    for site, parts in factors.items():
        if any(sums.bad for sums in parts.values()):
            continue
        size = math.prod(sums.norm for key, sums in parts.items() if key != MAGNITUDE)
        scale = scales[site]
        if abs(scale) > MAX_SCALE:
            found.refuse(
                f"{shown(site)}: the change is scaled by {scale:.3g}; at most {MAX_SCALE:.0e} is taken", "scale"
            )
        elif not scale * size <= MAX_CHANGE:
            found.refuse(f"{shown(site)}: the change has a norm of up to {scale * size:.3g}", "scale")


def _sums(flat: Tensor) -> Sums:
    """The sums of a piece."""
    wide = flat if flat.dtype == torch.float64 else flat.float()
    squares = float(torch.dot(wide, wide))
    if math.isfinite(squares) and (squares > 0 or all(float(end) == 0 for end in torch.aminmax(wide))):
        return Sums(flat.numel(), 0, squares)
    # fp32 has no room for squares of numbers above 2e19 or below 1e-23.
    fine = torch.isfinite(wide)
    bad = fine.numel() - int(fine.count_nonzero())
    if bad:
        return Sums(flat.numel(), bad, 0.0)
    kept = wide.double()
    return Sums(flat.numel(), 0, float(torch.dot(kept, kept)))
