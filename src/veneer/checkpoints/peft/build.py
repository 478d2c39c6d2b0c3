"""From tensors that were read to an adapter.

PiSSA and OLoRA folders hold factors that began as a part of the base, W_0 = W - s B_0 A_0 being what was frozen. (B_0, A_0) follow
from W, so with ``convert`` they are computed again and the change is stored as what it is to W, at twice the rank:

    W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.adapters.methods import DoRA, LoRA, Method
from veneer.adapters.overrides import problems_of
from veneer.checkpoints.findings import Findings, shown
from veneer.checkpoints.peft.overrides_in import Whole, inside, own_values
from veneer.checkpoints.peft.patterns import Table, names_for, table_for
from veneer.checkpoints.peft.placement import Plan, tensor_names
from veneer.checkpoints.peft.settings import INIT_MOVES_BASE, INIT_PLAIN, MAX_RANK, Settings
from veneer.checkpoints.peft.tensor_names import MAGNITUDE
from veneer.errors import ConfigError

CONVERTED = ("pissa", "olora")
_OWN = ("loraplus_lr_ratio", "dropout_form", "exact_norm_gradient")


def build(
    name: str,
    plan: Plan,
    whole: Whole,
    settings: Settings,
    stored: dict[str, Tensor],
    receipt: dict[str, Any] | None,
    bank: Bank | None,
    found: Findings,
) -> Adapter:
    """The adapter of the tensors in ``stored``, which are taken out of it. Masters are fp32 (fp64 on an fp64 base)."""
    wide = [bank is not None and bank.sites[site].weight_2d.dtype == torch.float64 for site in plan.sites]
    dtype = torch.float64 if wide and all(wide) else torch.float32
    tensors: dict[str, dict[str, Tensor]] = {}
    for site, own in plan.sites.items():
        tensors[site] = {key: stored.pop(own[key].name).to(dtype) for key in tensor_names(plan.kinds[site], settings)}
        if plan.kinds[site] == "conv2d" and MAGNITUDE in tensors[site]:
            tensors[site][MAGNITUDE] = tensors[site][MAGNITUDE].reshape(-1)
    if settings.ensure_weight_tying:
        _drop_followers(tensors, bank, found)
    alpha_table = Table(settings.alpha_pattern)
    alphas = {site: alpha_table.get(site, settings.lora_alpha)[0] for site in tensors}
    if settings.init_lora_weights in CONVERTED and bank is not None:
        settings, alphas = _convert(tensors, alphas, settings, bank)
    noted = receipt or {}
    seed, kinds = noted.get("seed", 0), {site: plan.kinds[site] for site in tensors}
    if bank is None and isinstance(noted.get("kinds"), dict):
        kinds |= {site: "conv1d" for site in noted["kinds"] if kinds.get(site) == "linear"}
    ranks = {site: next(iter(own.values())).shape[0] for site, own in tensors.items()}
    values, tokens = own_values(whole, stored, settings, bank)
    settings = _check_tying(settings, {**tensors, **values}, tensors, bank, found)
    method = _method(ranks, settings, alphas, noted.get("options"), bank, found)
    seed = seed if type(seed) is int else 0
    adapter = Adapter(name, method, tensors, kinds, overrides=values, tokens=tokens, alphas=alphas, seed=seed)
    if bank is not None:
        for place in values:
            for problem in problems_of(adapter, place, bank.sites.get(place) or bank.vector_layers.get(place)):
                found.refuse(problem)
    return adapter


def _check_tying(
    settings: Settings, present: Mapping[str, object], adapted: Mapping[str, object], bank: Bank | None, found: Findings
) -> Settings:
    """ensure_weight_tying without an embedding that the base ties means nothing, in PEFT too; with DoRA on one it cannot be had."""
    if not settings.ensure_weight_tying or bank is None:
        return settings
    sources = {site.tied_to for site in bank.sites.values() if site.tied_to in present}
    if not sources:
        found.note(
            "ensure_weight_tying is set, but the adapter acts on no embedding that the base shares with its head: ignored"
        )
        return settings.model_copy(update={"ensure_weight_tying": False})
    if settings.use_dora and sources & set(adapted):
        found.refuse(
            "ensure_weight_tying: a DoRA magnitude belongs to one side of a layer and cannot be shared with the head"
        )
    return settings


def _drop_followers(tensors: dict[str, dict[str, Tensor]], bank: Bank | None, found: Findings) -> None:
    """With ensure_weight_tying PEFT also writes the head's factors, which are the embedding's transposed: the head follows them here."""
    embeddings = {site: own for site, own in tensors.items() if "lora_embedding_A" in own}
    for site in [site for site, own in tensors.items() if "lora_A" in own]:
        for source, factors in embeddings.items():
            a, b = factors["lora_embedding_B"].T, factors["lora_embedding_A"].T
            if torch.equal(tensors[site]["lora_A"], a) and torch.equal(tensors[site]["lora_B"], b):
                del tensors[site]
                break
            if bank is not None and bank.sites[site].tied_to == source:
                found.refuse(
                    f"{shown(site)}: ensure_weight_tying is set, but its factors are not those of {shown(source)}"
                )


def _method(
    ranks: dict[str, int], settings: Settings, alphas: dict[str, float], own: object, bank: Bank | None, found: Findings
) -> Method:
    every = [path for path, _ in bank.model.named_modules()] if bank is not None else []
    targets = names_for(ranks, every) if every else sorted(ranks)
    cls = DoRA if settings.use_dora else LoRA
    options: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "init_lora_weights": "gaussian" if settings.init_lora_weights == "gaussian" else "kaiming_uniform",
        "target_modules": tuple(sorted(ranks)) if isinstance(targets, str) else tuple(targets),
        "rank_pattern": table_for(ranks, settings.r),
        "alpha_pattern": table_for(alphas, settings.lora_alpha),
        "ensure_weight_tying": settings.ensure_weight_tying,
        "bias": settings.bias,
        "lora_bias": settings.lora_bias,
        "modules_to_save": _declared(settings, bank),
    }
    if isinstance(settings.trainable_token_indices, list):
        options["trainable_token_indices"] = tuple(settings.trainable_token_indices)
    extra = {key: value for key, value in own.items() if key in _OWN} if isinstance(own, dict) else {}
    try:
        return cls(**options, **extra)
    except ConfigError as error:
        found.refuse(f"the receipt holds options that cannot be: {shown(error)}", "receipt")
        return cls(**options)


def _declared(settings: Settings, bank: Bank | None) -> tuple[str, ...]:
    """Names in ``modules_to_save`` that mean something here: PEFT adds the usual heads' names to every classifier."""
    names = settings.modules_to_save or []
    if bank is None:
        return tuple(names)
    return tuple(name for name in names if any(inside(path, name) for path in (*bank.sites, *bank.vector_layers)))


def check_init(settings: Settings, plan: Plan, bank: Bank | None, convert: bool, found: Findings) -> None:
    """Refuse initialisers that leave the base changed, unless they can be, and shall be, converted."""
    init = settings.init_lora_weights
    if init in INIT_PLAIN:
        return
    if not isinstance(init, str) or init.split("_niter_")[0] not in INIT_MOVES_BASE:
        found.refuse(
            f"init_lora_weights: {shown(init, 40)} is not known, so whether it changes the base is not known", "config"
        )
        return
    text = f'init_lora_weights "{shown(init, 40)}" takes a part of the base into the adapter, so its tensors are no change to this base'
    hint = "save it converted, with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    ours = "convert it with veneer export FOLDER --to peft --base MODEL --out NEW (from Python: bank.load(..., convert=True))"
    taken = ("linear", "conv1d") if init == "pissa" else ("linear",)
    if init not in CONVERTED:
        found.refuse(f"{text}; {hint}")
    elif not convert or bank is None:
        found.refuse(f"{text}; {ours}, or {hint}")
    elif wrong := [site for site, kind in plan.kinds.items() if kind not in taken]:
        found.refuse(f"{text}; {shown(wrong[0])}, a {plan.kinds[wrong[0]]} layer, cannot be converted; {hint}")
    elif max(plan.ranks.values(), default=0) > MAX_RANK // 2:
        found.refuse(f"{text}; converted, its rank would be above {MAX_RANK:,}")


def _convert(
    tensors: dict[str, dict[str, Tensor]], alphas: dict[str, float], settings: Settings, bank: Bank
) -> tuple[Settings, dict[str, float]]:
    """Turn factors that began as a part of the base into the change that they are, in place; returns settings and alphas for it."""
    for site, own in tensors.items():
        a, b = own["lora_A"], own["lora_B"]
        scale = settings.scaling(a.shape[0], alphas[site])
        weight = bank.sites[site].weight_2d.to(device="cpu", dtype=a.dtype)
        a_0, b_0 = _first_factors(str(settings.init_lora_weights), weight, a.shape[0], scale)
        own["lora_A"], own["lora_B"] = torch.cat([a, a_0]), torch.cat([b, -b_0], 1)
    # At twice the rank the same scale takes another lora_alpha.
    factor = math.sqrt(2) if settings.use_rslora else 2
    new = settings.model_copy(update={"r": 2 * settings.r, "lora_alpha": factor * settings.lora_alpha})
    return new, {site: factor * alpha for site, alpha in alphas.items()}


def _first_factors(init: str, weight_OK: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A_0 [r, in], B_0 [out, r]) from which training started.

    pissa: s B_0 A_0 is the best approximation of rank r (arXiv 2404.02948, eq. 2). olora: B_0 A_0 = Q_r R_r of W = Q R (2406.01775).
    """
    if init == "olora":
        q, upper = torch.linalg.qr(weight_OK)
        return upper[:r], q[:, :r]
    left, values, right = torch.linalg.svd(weight_OK, full_matrices=False)
    root = (values[:r] / scale).sqrt()
    return root.unsqueeze(1) * right[:r], left[:, :r] * root
