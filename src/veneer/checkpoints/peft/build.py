"""An adapter from the tensors of a folder.

PiSSA and OLoRA folders hold factors that began as a part of the base, with W_0 = W - s B_0 A_0 frozen. (B_0, A_0) follow from W, so with
``convert`` they are computed again, and the adapter becomes its change to W, at twice the rank:

    W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter, share_outer
from veneer.adapters.methods import Method
from veneer.adapters.methods.initialisers import MOVING, first_factors
from veneer.adapters.overrides import ROWS, WEIGHT
from veneer.checkpoints.base_view import BaseView
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.peft.patterns import names_for, table_for
from veneer.checkpoints.peft.placement import Placement
from veneer.checkpoints.peft.settings import INIT_MOVES_BASE, INIT_PLAIN, MAX_RANK, Settings
from veneer.errors import ConfigError

CONVERTED = MOVING
SiteTensors = dict[str, dict[str, Tensor]]


def build(
    name: str,
    placement: Placement,
    settings: Settings,
    stored: dict[str, Tensor],
    receipt: Mapping[str, Any],
    base: BaseView,
    found: Findings,
) -> Adapter:
    """The adapter of the tensors in ``stored``, which are taken out of it. Masters are fp32 (fp64 on an fp64 base)."""
    _drop_copies(placement, stored, base, found)
    dtype = base.master_dtype(placement.sites)
    tensors = {
        site: {
            key: stored.pop(entries[key].name).to(dtype).reshape(shape) for key, shape in placement.shapes[site].items()
        }
        for site, entries in placement.sites.items()
    }
    if settings.ensure_weight_tying:
        _drop_followers(tensors, base, found)
    alphas = {site: placement.alphas[site] for site in tensors if site in placement.alphas}
    if settings.init_lora_weights in CONVERTED:
        settings, alphas = _convert(tensors, alphas, settings, base)
    overrides, tokens = _overrides(placement, stored, settings, base)
    settings = _check_tying(settings, placement.method, tensors, overrides, base, found)
    ranks = {site: next(iter(held.values())).shape[0] for site, held in tensors.items()}
    shared = {name: stored.pop(entry.name) for name, entry in placement.shared.items()}
    shapes = {name: tuple(value.shape) for name, value in shared.items()}
    method = _method(type(placement.method), ranks, alphas, settings, receipt.get("options"), base, shapes, found)
    if not shared and method.shared_names and tensors.keys() <= base.sites.keys():
        method = method.fitted([base.sites[site] for site in tensors])
    _check_shared(method, shared, found)
    if method.shares_experts:
        _share_again(tensors, base)
    kinds = {site: placement.kinds[site] for site in tensors}
    if not base.sites and isinstance(receipt.get("kinds"), dict):
        kinds |= {site: "conv1d" for site in receipt["kinds"] if kinds.get(site) == "linear"}
    seed = receipt.get("seed")
    seed = seed if type(seed) is int else 0
    adapter = Adapter(name, method, tensors, kinds, overrides=overrides, tokens=tokens, alphas=alphas, seed=seed)
    adapter.parts = _parts(receipt, base, tensors)
    for problem in base.misfits(adapter):
        found.refuse(problem)
    return adapter


def _check_shared(method: Method, shared: Mapping[str, Tensor], found: Findings) -> None:
    """Refuse a file whose constants are not those that its settings give."""
    try:
        expected = method.shared()
    except ValueError as error:
        found.refuse(str(error))
        return
    for name, value in shared.items():
        if not torch.allclose(value.float(), expected[name], rtol=1e-5, atol=1e-6):
            found.refuse(f"{shown(name)} is not the projection that projection_prng_key in adapter_config.json gives")


def _parts(receipt: Mapping[str, Any], base: BaseView, tensors: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The projections of fused layers that the adapter was made for, by its receipt, where the base has them."""
    recorded = receipt.get("parts")
    found = {}
    for site, names in recorded.items() if isinstance(recorded, dict) else ():
        known = base.sites[site].parts if site in tensors and site in base.sites else {}
        if known and isinstance(names, list) and set(map(str, names)) <= set(known):
            found[site] = tuple(map(str, names))
    return found


def _share_again(tensors: SiteTensors, base: BaseView) -> None:
    """Let experts whose factors on the hidden side are equal share them again: a file holds a copy for each."""
    experts = [site for site in tensors if base.is_expert(site)]
    before = {site: dict(tensors[site]) for site in experts}
    share_outer(tensors, experts)
    if any(not torch.equal(tensors[site][key], before[site][key]) for site in experts for key in before[site]):
        tensors |= before


def _drop_copies(placement: Placement, stored: dict[str, Tensor], base: BaseView, found: Findings) -> None:
    """Drop copies of the base's weights that are equal to it; others are refused, or with force="embeddings" become overrides."""
    for site, entry in placement.copies.items():
        equal = base.holds(site, stored[entry.name])
        if equal is False:
            found.refuse(
                f"tensor {shown(entry.name)} differs from the base's own weight: another base, or an embedding that was trained or "
                "resized without being declared in modules_to_save",
                "embeddings",
            )
            placement.overrides.setdefault(site, {})[WEIGHT] = entry
            continue
        del stored[entry.name]
        how = "equal to it, which is skipped" if equal else "which was not compared, because the base is not loaded"
        found.note(f"{shown(site)}: the file has a copy of the base's weight, {how}")


def _overrides(
    placement: Placement, stored: dict[str, Tensor], settings: Settings, base: BaseView
) -> tuple[SiteTensors, dict[str, tuple[int, ...]]]:
    """(overrides, tokens). Layers that share a weight in the base share rows, and with ensure_weight_tying the weight."""
    overrides = {
        layer: {key: stored.pop(entry.name).float() for key, entry in entries.items()}
        for layer, entries in placement.overrides.items()
    }
    tokens = dict(placement.tokens)
    for site in base.sites.values():
        source = overrides.get(site.tied_to or "", {})
        if ROWS in source and site.name not in overrides and site.tied_to is not None:
            overrides[site.name], tokens[site.name] = {ROWS: source[ROWS]}, tokens[site.tied_to]
        head = overrides.get(site.name, {})
        if (
            settings.ensure_weight_tying
            and WEIGHT in source
            and WEIGHT in head
            and torch.equal(source[WEIGHT], head[WEIGHT])
        ):
            head[WEIGHT] = source[WEIGHT]
    return overrides, tokens


def _check_tying(
    settings: Settings, method: Method, tensors: SiteTensors, overrides: SiteTensors, base: BaseView, found: Findings
) -> Settings:
    """ensure_weight_tying without an embedding that the base ties means nothing, in PEFT too; not every method can serve the head."""
    if not settings.ensure_weight_tying or not base.sites:
        return settings
    sources = {site.tied_to for site in base.sites.values()} & {*tensors, *overrides}
    if not sources:
        found.note(
            "ensure_weight_tying is set, but the adapter acts on no embedding that the base shares with its head: ignored"
        )
        return settings.model_copy(update={"ensure_weight_tying": False})
    if not method.serves_tied_head and not sources.isdisjoint(tensors):
        found.refuse(
            f"ensure_weight_tying: the tied head cannot use the tensors of a {method.label} adapter at the embedding"
        )
    return settings


def _drop_followers(tensors: SiteTensors, base: BaseView, found: Findings) -> None:
    """With ensure_weight_tying PEFT also writes the head's factors, the embedding's transposed; here the head follows the embedding."""
    embeddings = {site: factors for site, factors in tensors.items() if "lora_embedding_A" in factors}
    for site in [site for site, factors in tensors.items() if "lora_A" in factors]:
        for source, factors in embeddings.items():
            a, b = factors["lora_embedding_B"].T, factors["lora_embedding_A"].T
            if torch.equal(tensors[site]["lora_A"], a) and torch.equal(tensors[site]["lora_B"], b):
                del tensors[site]
                break
            if base.tied_to(site) == source:
                found.refuse(
                    f"{shown(site)}: ensure_weight_tying is set, but its factors are not those of {shown(source)}"
                )


def _method(
    cls: type[Method],
    ranks: dict[str, int],
    alphas: dict[str, float],
    settings: Settings,
    recorded: object,
    base: BaseView,
    shared: Mapping[str, tuple[int, ...]],
    found: Findings,
) -> Method:
    """The adapter's options. recorded: the receipt's, for those that the settings have no key for."""
    options = (
        _low_rank_options(ranks, alphas, settings, base) if cls.low_rank else cls.options_of(settings.of_method, shared)
    )
    if ranks and not cls.low_rank and not isinstance(recorded, dict):
        targets = names_for(ranks, base.paths)
        options["target_modules"] = tuple(sorted(ranks)) if isinstance(targets, str) else tuple(targets)
        options["modules_to_save"] = base.meaningful(settings.modules_to_save or ())
    options["ensure_weight_tying"] = settings.ensure_weight_tying
    if isinstance(settings.trainable_token_indices, list):
        options["trainable_token_indices"] = tuple(settings.trainable_token_indices)
    known = [*cls.beyond_peft, *(["lora_dropout"] if cls.low_rank else [])]  # PEFT holds none beside target_parameters
    extra = {key: recorded[key] for key in known if key in recorded} if isinstance(recorded, dict) else {}
    try:
        return cls(**{**options, **extra})
    except ConfigError as error:
        found.refuse(f"the settings or the receipt hold options that are not valid: {shown(error)}", "receipt")
        return cls(**options) if cls.low_rank else cls()


def _low_rank_options(
    ranks: dict[str, int], alphas: dict[str, float], settings: Settings, base: BaseView
) -> dict[str, Any]:
    targets = names_for(ranks, base.paths)
    return {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "init_lora_weights": "gaussian" if settings.init_lora_weights == "gaussian" else "kaiming_uniform",
        "target_modules": tuple(sorted(ranks)) if isinstance(targets, str) else tuple(targets),
        "rank_pattern": table_for(ranks, settings.r),
        "alpha_pattern": table_for(alphas, settings.lora_alpha),
        "bias": settings.bias,
        "lora_bias": settings.lora_bias,
        "modules_to_save": base.meaningful(settings.modules_to_save or ()),
    }


# Initialisers that move a part of the base into the adapter


def check_init(settings: Settings, placement: Placement, base: BaseView, convert: bool, found: Findings) -> None:
    """Refuse initialisers that leave the base changed, unless they can, and shall, be converted."""
    init = settings.init_lora_weights
    if init in INIT_PLAIN:
        return
    if not isinstance(init, str) or init.split("_niter_")[0] not in INIT_MOVES_BASE:
        found.refuse(f"init_lora_weights: {shown(init, 40)} is not known, and may change the base", "config")
        return
    text = f'init_lora_weights "{shown(init, 40)}" takes a part of the base into the adapter, so its tensors alone are not its change'
    hint = "save it converted, with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    ours = "convert it with veneer export FOLDER --to peft --base MODEL --out NEW (from Python: bank.load(..., convert=True))"
    kinds = ("linear", "conv1d") if init == "pissa" else ("linear",)
    if init not in CONVERTED:
        found.refuse(f"{text}; {hint}")
    elif not convert or not base.sites:
        found.refuse(f"{text}; {ours}, or {hint}")
    elif wrong := [site for site, kind in placement.kinds.items() if kind not in kinds]:
        found.refuse(f"{text}; {shown(wrong[0])}, a {placement.kinds[wrong[0]]} layer, cannot be converted; {hint}")
    elif max(placement.ranks.values(), default=0) > MAX_RANK // 2:
        found.refuse(f"{text}; converted, its rank would be above {MAX_RANK:,}")


def _convert(
    tensors: SiteTensors, alphas: Mapping[str, float], settings: Settings, base: BaseView
) -> tuple[Settings, dict[str, float]]:
    """Turn factors that began as a part of the base into a change to it, in place; returns the settings and alphas of the change."""
    for site, factors in tensors.items():
        a, b = factors["lora_A"], factors["lora_B"]
        scale = settings.scaling(a.shape[0], alphas[site])
        weight = base.sites[site].weight_2d.to(device="cpu", dtype=a.dtype)
        a_0, b_0 = first_factors(str(settings.init_lora_weights), weight, a.shape[0], scale)
        factors["lora_A"], factors["lora_B"] = torch.cat([a, a_0]), torch.cat([b, -b_0], 1)
    # At twice the rank the same scale takes another lora_alpha.
    factor = math.sqrt(2) if settings.use_rslora else 2
    new = settings.model_copy(update={"r": 2 * settings.r, "lora_alpha": factor * settings.lora_alpha})
    return new, {site: factor * alpha for site, alpha in alphas.items()}
