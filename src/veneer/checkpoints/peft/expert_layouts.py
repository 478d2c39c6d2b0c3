"""Layouts in which files hold the factors of stacked experts, turned into the factors of each expert.

    PEFT's target_parameters   <stack>.lora_A [E*r, in] expert by expert, <stack>.lora_B [out, r*E] rank by rank; of two parameters the
                               one declared first is the inner (<stack>.base_layer.lora_A)
    3-D factors                <stack>.w1.lora_A [E or 1, r, in], lora_B [E or 1, out, r]; a size of 1 is shared by all experts (Tinker)
    per expert                 <stack>.7.gate_proj.lora_A [r, in], and under the names of the base's own files (<stack>.7.w1.lora_A)

A fused gate_up_proj is split into its parts as the base lays them out, one after the other or interleaved. Without a base the parts are
not known, and the fused parameter stays one site (``<stack>.7.gate_up_proj``), which a base splits later.

Shapes: E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.experts import Part
from veneer.checkpoints.base_view import BaseView, StackLayout
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.peft.patterns import PatternTable, ends_with
from veneer.checkpoints.peft.settings import Settings
from veneer.checkpoints.peft.tensor_names import Key
from veneer.checkpoints.tensors import Entry

_WRAPPED = ".base_layer"
_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_WHOLE = slice(None)
Keys = list[tuple[Key, Entry]]


@dataclass
class Expansion:
    """Tensors that are made from those of a file.

    Attributes:
        unsplit: sites that are a fused parameter of an expert, since the base is not known.
        made: {name: (the stored tensor's name, how it is made)}.
        named: {site: the name under which the settings mean it}, where it is not the site's own.
    """

    made: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    unsplit: list[str] = field(default_factory=list)

    def apply(self, stored: dict[str, Tensor]) -> None:
        """Put the made tensors in the place of those that they are made from."""
        made = {name: make(stored[source]).clone() for name, (source, make) in self.made.items()}
        for source in {source for source, _ in self.made.values()}:
            del stored[source]
        stored |= made

    def add(
        self, site: str, tensor: str, source: Entry, shape: tuple[int, ...], make: Callable[[Tensor], Tensor]
    ) -> tuple[Key, Entry]:
        """Declare a tensor of a site that is made from a stored one."""
        name = f"{site}.{tensor}"
        self.made[name] = source.name, make
        return Key(site, tensor, "low_rank"), Entry(name, source.dtype, shape, 0, 0)


def expand_experts(
    keys: Keys, settings: Settings, base: BaseView, receipt: Mapping[str, Any] | None, found: Findings
) -> tuple[Keys, Expansion]:
    """The keys of a file with each expert's own, and how their tensors are made from the stored ones."""
    site_of = base.site_of if base.sites else named_in_receipt(receipt)
    expansion = Expansion()
    kept: Keys = []
    stacked: dict[str, dict[str, tuple[Key, Entry]]] = {}
    for key, entry in keys:
        if key.kind != "low_rank":
            kept.append((key, entry))
            continue
        site = site_of(key.site)
        if site != key.site:
            expansion.named[site] = key.site
            key = Key(site, key.tensor, key.kind, key.beside, key.adapter, key.prefixed)
        if _stack_of(site, base, settings) is not None or _is_three_dimensional(site, entry, base):
            stacked.setdefault(site, {})[key.tensor] = (key, entry)
        else:
            kept += _split(key, entry, base, expansion)
    for site, tensors in stacked.items():
        factors = {name: entry for name, (_, entry) in tensors.items()}
        if set(factors) != {"lora_A", "lora_B"}:
            other = sorted(set(factors) - {"lora_A", "lora_B"})
            found.refuse(
                f"{shown(site)}: expected lora_A and lora_B of stacked experts, found {', '.join(sorted(factors))}"
                + (f"; {other[0]} has no stacked form, so it must be stored for each expert" if other else "")
            )
        elif len(factors["lora_A"].shape) == 3:
            kept += _three_dimensional(site, factors, base, expansion, found)
        else:
            levels = [other for other in stacked if _unwrapped(other) == _unwrapped(site)]
            kept += _fused(site, levels, factors, settings, base, expansion, found)
    return kept, expansion


def fit_experts(adapter: Adapter, base: BaseView) -> None:
    """Give an adapter that was read without its base the sites of this base: experts by their names there, fused parameters split."""
    unsplit = set(adapter.meta.get("unsplit", ()))
    renamed: dict[str, dict[str, dict[str, Tensor]]] = {}
    for site, held in adapter.tensors.items():
        target = base.site_of(site)
        stack, _, parameter = target.rpartition(".")
        stack, _, number = stack.rpartition(".")
        layout = base.stack_layout(stack) if number.isdigit() else None
        parts = layout.parts(parameter) if layout is not None else ()
        turned = layout is not None and layout.exchanged and site in unsplit
        if layout is None or (len(parts) < 2 and not turned):
            if target != site:
                renamed[site] = {target: dict(held)}
            continue
        a, b = held["lora_A"].detach(), held["lora_B"].detach()
        a, b = (b.T, a.T) if turned else (a, b)
        renamed[site] = {
            f"{stack}.{number}.{part.name}": {
                "lora_A": a.clone(),
                **{
                    key: value.detach()[part.columns].clone()
                    for key, value in {**held, "lora_B": b}.items()
                    if key != "lora_A"
                },
            }
            for part in parts
        }
    if renamed:
        adapter.replace_sites(renamed)


def named_in_receipt(receipt: Mapping[str, Any] | None) -> Callable[[str], str]:
    """The names of experts' layers in the model, by those in a file, as the file's receipt records them."""
    record = (receipt or {}).get("experts")
    stacks, parts = (record.get("stacks"), record.get("parts")) if isinstance(record, dict) else (None, None)

    def site_of(name: str) -> str:
        stack, _, rest = name.rpartition(".")
        stack, _, number = stack.rpartition(".")
        if not isinstance(stacks, dict) or not isinstance(parts, dict) or stack not in stacks or rest not in parts:
            return name
        return f"{stacks[stack]}.{number}.{parts[rest]}"

    return site_of


def _unwrapped(site: str) -> str:
    while site.endswith(_WRAPPED):
        site = site.removesuffix(_WRAPPED)
    return site


def _stack_of(site: str, base: BaseView, settings: Settings) -> str | None:
    """The stack whose fused factors a name holds, or None."""
    stack = _unwrapped(site)
    if base.sites:
        return stack if base.stack_layout(stack) is not None else None
    named = [
        name.rpartition(".")[0] or "experts"
        for name in settings.target_parameters or ()
        if not name.endswith(".weight")
    ]
    return stack if any(ends_with(stack, name) for name in named) else None


def _is_three_dimensional(site: str, entry: Entry, base: BaseView) -> bool:
    stack, _, role = site.rpartition(".")
    known = base.stack_layout(stack) is not None if base.sites else ends_with(stack, "experts") and role in _ROLES
    return known and len(entry.shape) == 3


def _split(key: Key, entry: Entry, base: BaseView, expansion: Expansion) -> Keys:
    """The keys of one expert's tensor: of a fused parameter, one for each of its parts."""
    stack, _, parameter = key.site.rpartition(".")
    stack, _, number = stack.rpartition(".")
    layout = base.stack_layout(stack) if number.isdigit() else None
    parts = layout.parts(parameter) if layout is not None else ()
    if layout is None or len(parts) < 2 or len(entry.shape) > 2:
        return [(key, entry)]
    found = []
    for part in parts:
        site = f"{stack}.{number}.{part.name}"
        expansion.named[site] = expansion.named.get(key.site, key.site)
        rows = entry.shape if key.tensor == "lora_A" else (layout.size(part), *entry.shape[1:])
        columns = _WHOLE if key.tensor == "lora_A" else part.columns
        found.append(expansion.add(site, key.tensor, entry, rows, _part_of(columns)))
    return found


def _three_dimensional(
    site: str, factors: Mapping[str, Entry], base: BaseView, expansion: Expansion, found: Findings
) -> Keys:
    """The keys of 3-D factors [E or 1, r, in] and [E or 1, out, r]."""
    stack, _, role = site.rpartition(".")
    role = _ROLES.get(role, role)
    a, b = factors["lora_A"], factors["lora_B"]
    layout = base.stack_layout(stack)
    experts = layout.count if layout is not None else max(a.shape[0], b.shape[0])
    counts = {a.shape[0], b.shape[0]}
    if len(b.shape) != 3 or not counts <= {1, experts} or a.shape[1] != b.shape[2]:
        found.refuse(
            f"{shown(site)}: expected lora_A [{experts} or 1, r, in] and lora_B [{experts} or 1, out, r], found {a.shape} and {b.shape}"
        )
        return []
    if layout is not None and not layout.has(role):
        found.refuse(f"{shown(site)}: the base's experts have no {role}")
        return []
    keys: Keys = []
    for expert in range(experts):
        for name, entry in factors.items():
            at = 0 if entry.shape[0] == 1 else expert
            target = f"{stack}.{expert}.{role}"
            expansion.named[target] = expansion.named.get(site, site)
            keys.append(expansion.add(target, name, entry, entry.shape[1:], _entry_of(at)))
    return keys


def _fused(
    site: str,
    levels: Sequence[str],
    factors: Mapping[str, Entry],
    settings: Settings,
    base: BaseView,
    expansion: Expansion,
    found: Findings,
) -> Keys:
    """The keys of PEFT's factors of a fused parameter. levels: the names of all wrappers around this stack."""
    a, b = factors["lora_A"], factors["lora_B"]
    stack = _unwrapped(site)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        found.refuse(f"{shown(site)}: expected lora_A [E*r, in] and lora_B [out, r*E], found {a.shape} and {b.shape}")
        return []
    layout = base.stack_layout(stack)
    parameter = _parameter_of(site, levels, a, b, layout, settings)
    if parameter is None:
        known = (
            ""
            if layout is None
            else "; the base has "
            + ", ".join(f"{name} [{layout.count}, {out}, {in_}]" for name, (out, in_, _) in layout.parameters.items())
        )
        found.refuse(
            f"{shown(site)}: target_parameters names no parameter of this stack whose factors have {a.shape[1]} inputs and {b.shape[0]} "
            f"outputs{known}"
        )
        return []
    name = f"{stack}.{parameter}"
    declared = PatternTable(settings.rank_pattern).get(name, settings.r)[0]
    experts = layout.count if layout is not None else a.shape[0] // declared
    if not experts or a.shape[0] % experts or (layout is None and a.shape[0] % declared):
        found.refuse(
            f"{shown(site)}: {a.shape[0]} rows of lora_A are not a multiple of {experts if layout else declared}"
        )
        return []
    rank = a.shape[0] // experts
    parts = layout.parts(parameter) if layout is not None else (Part(parameter, parameter, _WHOLE),)
    keys: Keys = []
    for expert in range(experts):
        for part in parts:
            target = f"{stack}.{expert}.{part.name}"
            expansion.named[target] = name
            if layout is None:
                expansion.unsplit.append(target)
            out = b.shape[0] if layout is None else layout.size(part)
            if layout is not None and layout.exchanged:
                down, up = _columns_of(expert, experts, _WHOLE), _rows_of(expert, rank, part.columns)
                keys.append(expansion.add(target, "lora_A", b, (rank, b.shape[0]), _turned(down)))
                keys.append(expansion.add(target, "lora_B", a, (out, rank), _turned(up)))
            else:
                keys.append(expansion.add(target, "lora_A", a, (rank, a.shape[1]), _rows_of(expert, rank, _WHOLE)))
                keys.append(expansion.add(target, "lora_B", b, (out, rank), _columns_of(expert, experts, part.columns)))
    return keys


def _turned(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda value: make(value).T


def _part_of(rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda value: value[rows]


def _entry_of(at: int) -> Callable[[Tensor], Tensor]:
    return lambda value: value[at]


def _rows_of(expert: int, rank: int, columns: slice) -> Callable[[Tensor], Tensor]:
    return lambda value: value[expert * rank : (expert + 1) * rank, columns]


def _columns_of(expert: int, experts: int, rows: slice) -> Callable[[Tensor], Tensor]:
    return lambda value: value[rows, expert::experts]


def _parameter_of(
    site: str, levels: Sequence[str], a: Entry, b: Entry, layout: StackLayout | None, settings: Settings
) -> str | None:
    """The fused parameter that a wrapper's factors belong to.

    PEFT nests the wrappers in the order in which the module declares its parameters, the first innermost. The order decides where shapes
    allow several.
    """
    stack = _unwrapped(site)
    asked = []
    for name in settings.target_parameters or ():
        module = name.rpartition(".")[0]
        asked += [name] if not module or ends_with(stack, module) else []
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in asked))
    order = list(layout.parameters) if layout is not None else sorted(names, key=lambda name: name.startswith("down"))
    order = [name for name in order if name in names]
    inner_first = sorted(levels, key=lambda other: -other.count(_WRAPPED))
    place = inner_first.index(site)
    by_order = order[place] if len(order) == len(levels) else None
    if layout is None:
        return by_order
    shape = (a.shape[1], b.shape[0]) if layout.exchanged else (b.shape[0], a.shape[1])
    fits = [name for name in order if layout.parameters[name][:2] == shape]
    if by_order in fits:
        return by_order
    return fits[0] if len(fits) == 1 else None
