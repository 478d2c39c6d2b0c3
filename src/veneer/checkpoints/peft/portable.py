"""Layers that PEFT reads otherwise than by their name in ``target_modules``, and those that it cannot read.

    mixtures of experts        PEFT takes gate_proj, up_proj, ... for the experts of older folders and turns them into target_parameters. A
                               layer of such a name is written as the parameter that it holds, which PEFT reads as the same change. A
                               parameter takes no magnitude, no bias of B and no dropout there.
    Mamba and its hybrids      PEFT refuses out_proj and conv1d: fused kernels read their weights past the layer
    renamed modules            PEFT applies transformers' table of renamings to every tensor's name; where the table changes a name of
                               today, the tensor is stored under the name that becomes it

    stacked experts            PEFT adapts the stacked parameters, with the same limits. It stacks separate factors of each expert for the
                               first kind of models; elsewhere a folder holds stacked ones

``all-linear`` leaves out the modules that PEFT cannot read; patterns that name them take them. It takes experts. This is PEFT 0.21's, and
``docs/peft.md`` has the architectures on which it was tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.adapters.layers.site import Site
from veneer.adapters.methods import Method
from veneer.adapters.targets import as_list
from veneer.checkpoints.peft.patterns import names_for
from veneer.models.names import conversion_family, respelt

CONVERTED = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Last parts of target_modules that PEFT turns into target_parameters, by the architecture whose conversion it applies."""
REFUSED_IN = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
REFUSED = frozenset({"out_proj", "conv1d"})
"""Last parts of names that PEFT refuses in models of these types."""


def as_parameters(model: nn.Module | None, sites: Mapping[str, Site]) -> frozenset[str]:
    """The sites of modules that PEFT adapts only if ``target_parameters`` names their weight."""
    if model is None:
        return frozenset()
    names = CONVERTED.get(_family(model), frozenset())
    return frozenset(
        name
        for name, site in sites.items()
        if site.stack is None and (name.rpartition(".")[2] in names or not site.layer_kind.is_layer)
    )


def converts_experts(model: nn.Module | None) -> bool:
    """True if PEFT stacks the separate factors of a folder's experts."""
    return model is not None and _family(model) in CONVERTED


def _family(model: nn.Module) -> str:
    # PEFT adds Mixtral itself to transformers' table, and leaves Qwen2-MoE out.
    return "mixtral" if _model_type(model) == "mixtral" else conversion_family(model)


def stored_sites(model: nn.Module | None, sites: Iterable[str]) -> dict[str, str]:
    """{site: its name in a folder} for the sites that are stored under an earlier name."""
    if model is None:
        return {}
    names = {f"{site}.weight": site for site in sites if site}
    return {
        names[key]: other.removesuffix(".weight") for key, other in respelt(model, names).items() if other is not None
    }


def not_portable(model: nn.Module | None, sites: Mapping[str, Site], method: Method) -> dict[str, str]:
    """{site: reason} for the sites whose change PEFT cannot read from a folder."""
    if model is None:
        return {}
    found: dict[str, str] = {}
    experts = [name for name, site in sites.items() if site.stack is not None]
    sites = {name: site for name, site in sites.items() if site.stack is None}
    kind = _model_type(model)
    if kind in REFUSED_IN:
        found |= {
            site: f"PEFT refuses such layers in {kind} models" for site in sites if site.rpartition(".")[2] in REFUSED
        }
    if not method.as_parameter or method.adds_bias:
        what = f"{method.label} change" if not method.as_parameter else "bias of B"
        reason = f"PEFT adapts such layers of {kind} models as bare parameters, which can have no {what}"
        found |= dict.fromkeys(as_parameters(model, sites), reason)
        found |= dict.fromkeys(experts, f"PEFT adapts stacked experts as bare parameters, which can have no {what}")
    lost = {key for key, other in respelt(model, (f"{site}.weight" for site in sites)).items() if other is None}
    found |= {
        site: "PEFT looks for such layers under other names, by transformers' table of renamings"
        for site in sites
        if f"{site}.weight" in lost
    }
    return found


def remarks(bank: Bank, adapter: Adapter) -> list[str]:
    """Sentences about layers that ``all-linear`` left out of an adapter, and about those that it has and PEFT cannot read.

    Each ends with the option that decides otherwise.
    """
    method, refused = adapter.method, bank.not_portable(adapter.method)
    if not refused or not adapter.tensors:
        return []
    asked = method.choose(bank.survey)
    paths = (*(path for path, _ in bank.model.named_modules()), *bank.uncovered, *bank.sites)
    lines = []
    left = {site: refused[site] for site in asked if site in refused and site not in adapter.tensors}
    for reason, sites in _by_reason(left).items():
        names = _names(sites, paths)
        lines.append(
            f"all-linear leaves out {_counted(sites)}: {reason}; to train them too, in a folder that PEFT does not read: "
            f"--target-modules {','.join([*as_list(method.target_modules), *names])}"
        )
    taken = {site: refused[site] for site in adapter.tensors if site in refused}
    readable = _names([site for site in adapter.tensors if site not in refused], paths)
    for reason, sites in _by_reason(taken).items():
        remedy = f"; targets that it reads: --target-modules {','.join(readable)}" if readable else ""
        lines.append(f"PEFT cannot read this adapter at {_counted(sites)}: {reason}{remedy}")
    return lines


def _by_reason(found: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for site, reason in found.items():
        reasons.setdefault(reason, []).append(site)
    return reasons


def _counted(sites: Iterable[str]) -> str:
    counts = Counter(site.rpartition(".")[2] for site in sites)
    return ", ".join(f"{name} ({count} layer{'s' if count > 1 else ''})" for name, count in sorted(counts.items()))


def _names(sites: list[str], paths: tuple[str, ...]) -> list[str]:
    names = names_for(sites, paths)
    return sorted(sites) if isinstance(names, str) else names


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))
