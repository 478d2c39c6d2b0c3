"""Do the settings of a folder agree with its tensors? Each is read for itself; where they differ, one of them is wrong.

PEFT builds layers from the settings and then fills in what the file has; a tensor that is missing leaves a layer at its random start,
one too many is dropped or lands on the base. Here the tensors decide, and a disagreement is refused.
"""

from __future__ import annotations

from veneer.adapters.bank import Bank
from veneer.checkpoints.findings import Findings, listed, shown
from veneer.checkpoints.peft.overrides_in import inside
from veneer.checkpoints.peft.patterns import Table, layer_of, tails
from veneer.checkpoints.peft.settings import Settings

MAX_TRIES = 1_000_000
"""Patterns times sites that are tried one by one."""


def check_agreement(ranks: dict[str, int], settings: Settings, bank: Bank | None, found: Findings) -> None:
    """Hold {site: rank of its tensors} against what the settings ask for."""
    _check_scale(ranks, settings, found)
    targets = settings.target_modules
    if isinstance(targets, str):
        if targets.lower() != "all-linear":
            found.note(
                f'target_modules is an expression ("{shown(targets, 60)}"), which is not evaluated: its tensors say that the adapter '
                f"has {len(ranks)} sites"
            )
    elif targets is not None:
        _check_targets(ranks, targets, settings, bank, found)


def _check_scale(ranks: dict[str, int], settings: Settings, found: Findings) -> None:
    rank_table, alpha_table = Table(settings.rank_pattern), Table(settings.alpha_pattern)
    if (rank_table.tried + alpha_table.tried) * len(ranks) > MAX_TRIES:
        found.refuse(
            "rank_pattern and alpha_pattern hold too many patterns: write the full names of the layers in their place"
        )
        return
    wrong: dict[tuple[int, int], list[str]] = {}
    unread: dict[str, None] = {}
    for site, rank in ranks.items():
        declared, unclear = rank_table.get(site, settings.r)
        if unclear:
            found.note(f'rank_pattern: "{shown(unclear[0], 60)}" is not evaluated; ranks are those of the tensors')
        elif declared != rank:
            wrong.setdefault((declared, rank), []).append(site)
        unread |= dict.fromkeys(alpha_table.get(site, settings.lora_alpha)[1][:1])
    for pattern in unread:
        found.refuse(
            f'alpha_pattern: "{shown(pattern, 60)}" needs a regular expression, which is not evaluated, and tensors do not tell '
            "lora_alpha: write the full names of the layers in its place"
        )
    for (declared, rank), sites in wrong.items():
        found.refuse(
            f"adapter_config.json declares rank {declared:,} at {listed(sites, 2)}; the tensors have rank {rank:,}"
        )


def _check_targets(
    ranks: dict[str, int], targets: list[str], settings: Settings, bank: Bank | None, found: Findings
) -> None:
    names = frozenset(targets)
    parameters = {name.rpartition(".")[0] for name in settings.target_parameters or ()}
    stray = [site for site in ranks if names.isdisjoint(tails(site)) and parameters.isdisjoint(tails(site))]
    if settings.ensure_weight_tying:
        # The head that follows an embedding is not named; whether it follows is seen from its tensors.
        stray = [
            site for site in stray if bank is not None and (site not in bank.sites or bank.sites[site].tied_to is None)
        ]
    if stray:
        found.refuse(
            f"target_modules in adapter_config.json does not name {listed(stray)}, which the file has tensors for",
            "config",
        )
    if bank is None:
        meant = {tail for site in ranks for tail in tails(site)}
        idle = [name for name in targets if name not in meant]
        if idle:
            found.note(f"target_modules names {listed(idle)}, which the file has no tensors for")
        return
    asked = [site.name for site in bank.sites.values() if not site.reason and _asked_for(site.name, names, settings)]
    missing = [name for name in asked if name not in ranks]
    if missing:
        found.refuse(
            f"target_modules in adapter_config.json names {listed(missing)}, which the file has no tensors for: it is incomplete",
            "config",
        )


def _asked_for(path: str, targets: frozenset[str], settings: Settings) -> bool:
    """Whether PEFT would adapt this layer by these settings."""
    if targets.isdisjoint(tails(path)):
        return False
    excluded = settings.exclude_modules
    if isinstance(excluded, str) or not set(tails(path)).isdisjoint(excluded or ()):
        # An expression is not evaluated; what it leaves out cannot be told from what is missing.
        return False
    if any(inside(path, name) for name in settings.modules_to_save or ()):
        return False
    return _layer_chosen(path, settings)


def _layer_chosen(path: str, settings: Settings) -> bool:
    layers = settings.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = settings.layers_pattern
    names: list[str | None] = [patterns] if isinstance(patterns, str) else [*(patterns or [])] or [None]
    number = next((found for name in names if (found := layer_of(path, name or None)) is not None), None)
    return number in ([layers] if isinstance(layers, int) else layers)
