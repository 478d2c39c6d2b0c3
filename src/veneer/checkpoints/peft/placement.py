"""Where each tensor of a PEFT folder goes, from the header alone: names, layers, shapes and ranks against the base's own.

Nothing is read yet but the header, so a file that does not fit costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from veneer.adapters.bank import Bank
from veneer.adapters.methods import DoRA, LoRA
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.overrides_in import foreign
from veneer.checkpoints.peft.settings import MAX_RANK, Settings
from veneer.checkpoints.peft.tensor_names import MAGNITUDE, Key, parse_key
from veneer.checkpoints.tensors import Entry, Header


@dataclass
class Plan:
    """Where each tensor of a file goes: {site: {tensor name: entry}} for the low-rank ones."""

    sites: dict[str, dict[str, Entry]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    whole: list[tuple[Key, Entry]] = field(default_factory=list)
    """Tensors that are no factors, in the order of the file."""

    @property
    def ranks(self) -> dict[str, int]:
        """A's first size, by site."""
        factors = {site: own.get("lora_A", own.get("lora_embedding_A")) for site, own in self.sites.items()}
        return {site: a.shape[0] for site, a in factors.items() if a is not None}


def plan_tensors(header: Header, found: Findings) -> Plan:
    """Take every name of the header apart; what is no tensor of an adapter is refused."""
    plan = Plan()
    adapters: set[str] = set()
    bare = 0
    for entry in header.entries:
        key = parse_key(entry.name)
        if key is None:
            found.refuse(foreign(entry.name))
            continue
        if key.kind != "low_rank":
            plan.whole.append((key, entry))
            continue
        own = plan.sites.setdefault(key.site, {})
        if key.tensor in own:
            found.refuse(f"{shown(entry.name)} and {shown(own[key.tensor].name)} are the same tensor of the same layer")
        own[key.tensor] = entry
        adapters |= {key.adapter} if key.adapter is not None else set()
        bare += not key.prefixed
    if len(adapters) > 1:
        found.refuse(
            f"the file holds {len(adapters)} adapters ({listed(sorted(adapters))}); expected one: save each in a folder of its own"
        )
    if bare:
        found.note(f"{bare} tensor names lack the prefix base_model.model. and are taken as paths in the base")
    if not header.entries:
        found.refuse("the file holds no tensor")
    return plan


def check_shapes(plan: Plan, settings: Settings, bank: Bank | None, found: Findings) -> None:
    """Hold every site's tensors against the layer that stands there, or without a base against each other."""
    for site, own in plan.sites.items():
        if bank is not None and not _known(site, bank, found):
            continue
        kind = _kind(site, own, settings, bank)
        plan.kinds[site] = kind
        expected = tensor_names(kind, settings)
        missing = [name for name in expected if name not in own]
        surplus = [name for name in own if name not in expected]
        if missing:
            found.refuse(f"{shown(site)}: {', '.join(missing)} is missing beside {', '.join(own)}")
        for name in surplus:
            why = "use_dora is false in adapter_config.json" if name == MAGNITUDE else f"the layer is a {kind} layer"
            found.refuse(f"{shown(site)}: {name} does not belong here: {why}")
        if not missing:
            _check_site_shapes(site, [own[name] for name in expected], kind, bank, found)


def tensor_names(kind: str, settings: Settings) -> tuple[str, ...]:
    """Names of a site's tensors under these settings."""
    return (DoRA if settings.use_dora else LoRA)().tensor_names(kind)


def _check_site_shapes(site: str, entries: list[Entry], kind: str, bank: Bank | None, found: Findings) -> None:
    r = entries[0].shape[0]
    if r > MAX_RANK:
        found.refuse(f"{shown(site)}: rank {r:,}; at most {MAX_RANK:,} is read")
        return
    if bank is not None:
        geometry = bank.sites[site].geometry
        expected = [geometry.shape_a(r), geometry.shape_b(r), (geometry.out,)]
    else:
        shape_a, shape_b = entries[0].shape, entries[1].shape
        out = shape_b[0]
        expected = [shape_a, (out, r, 1, 1) if kind == "conv2d" else (out, r), (out,)]
        if len(shape_a) != (4 if kind == "conv2d" else 2):
            found.refuse(f"{shown(entries[0].name)}: expected 2 sizes, or 4 for a convolution, found {shape_a}")
            return
    if kind == "conv2d":
        expected[2] = (1, expected[2][0], 1, 1)
    for entry, shape in zip(entries, expected, strict=False):
        if entry.shape != shape:
            found.refuse(f"{shown(entry.name)}: expected shape {shape}, found {entry.shape}")


def _known(site: str, bank: Bank, found: Findings) -> bool:
    """Whether the base has a layer of this path that an adapter can act on; if not, why."""
    if site in bank.sites:
        reason = bank.sites[site].reason
        if reason:
            found.refuse(f"{shown(site)} cannot be adapted: {reason}")
        return not reason
    why = next((text for path, text in bank.uncovered.items() if path == site or path.startswith(f"{site}.")), None)
    if why is not None:
        found.refuse(f"{shown(site)} cannot be adapted: {why}")
        return False
    near = (
        get_close_matches(site[:512], bank.sites, n=1, cutoff=0.8)
        if len(found.problems) < 3 and len(bank.sites) < 2000
        else []
    )
    found.refuse(f"{shown(site)}: the base has no such layer" + (f" (the nearest is {near[0]})" if near else ""))
    return False


def _kind(site: str, own: dict[str, Entry], settings: Settings, bank: Bank | None) -> str:
    if bank is not None:
        return bank.sites[site].kind
    if "lora_embedding_A" in own or "lora_embedding_B" in own:
        return "embedding"
    if any(len(entry.shape) == 4 for name, entry in own.items() if name != MAGNITUDE):
        return "conv2d"
    return "conv1d" if settings.fan_in_fan_out else "linear"
