"""Overrides: weights, biases and rows that replace those of the base for one adapter's tokens.

In addition to its low-rank changes an adapter may train a head, an embedding, a norm, biases, or the rows of a few tokens. This file has
their checks, their initial values and their deltas; ``runtime/override_path.py`` computes with them. A site can have overrides, and so
can a vector layer (a norm).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.methods import Method
from veneer.adapters.targets import as_list, matches
from veneer.errors import Problems, TargetError
from veneer.kernels.quantized.bitsandbytes import quantized_layer

WEIGHT, BIAS, ROWS, LORA_BIAS = "weight", "bias", "rows", "lora_bias"
_HEAD_SPREAD = 0.02
KINDS = (WEIGHT, BIAS, ROWS, LORA_BIAS)


def computed_with(module: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's own computation with other parameters. The module itself is not touched: a shallow twin holds the new ones."""
    if WEIGHT in values and quantized_layer(module):
        # A layer of bitsandbytes cannot hold a dense weight.
        bias: Any = values.get(BIAS, module.bias)
        y: Tensor = F.linear(x, values[WEIGHT], None if bias is None else bias.to(x.dtype))
        return y
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    parameters: dict[str, Any] = {**module._parameters, **values}
    twin.__dict__["_parameters"] = parameters
    out: Tensor = type(module).forward(twin, x)
    return out


def problems_of(adapter: Adapter, name: str, site: Site | None) -> list[str]:
    """The reasons why a layer cannot take an adapter's overrides; empty if it can."""
    tensors = adapter.overrides[name]
    if site is None:
        return [f"{name}: the base has no layer here that an adapter can override"]
    if site.stack is not None or not site.layer_kind.is_layer:
        what = "stacked experts" if site.stack is not None else "routers that choose the experts"
        return [f"{name}: overrides of {what} are not supported; leave them out of bias, lora_bias and modules_to_save"]
    found = [f"{name}: {site.reason}"] if site.reason else []
    module: Any = site.module
    for key, value in tensors.items():
        expected = _expected(module, site, key, adapter.tokens.get(name, ()))
        if site.is_classifier and expected is not None and WEIGHT in tensors and key in (WEIGHT, BIAS):
            expected = (tensors[WEIGHT].shape[0], *expected[1:])
        if expected is None:
            found.append(f"{name}: the layer has no {key}")
        elif tuple(value.shape) != expected:
            found.append(
                f"{name}.{key}: expected shape {expected}, found {tuple(value.shape)}{_other_width(site, value)}"
            )
    if ROWS in tensors:
        tokens, most = adapter.tokens.get(name, ()), module.weight.shape[0]
        if len(set(tokens)) < len(tokens) or not all(0 <= token < most for token in tokens):
            found.append(f"{name}.rows: expected distinct tokens from 0 to {most - 1}, found {list(tokens)[:8]}")
    if WEIGHT in tensors and ROWS in tensors:
        found.append(f"{name}: an adapter cannot have both the weight and rows of it")
    if site.name in adapter.tensors and (
        ROWS in tensors or (WEIGHT in tensors and WEIGHT not in adapter.method.overrides_beside)
    ):
        found.append(f"{name}: an adapter cannot both change this weight and override it")
    if LORA_BIAS in tensors and (name not in adapter.tensors or LORA_BIAS not in adapter.method.overrides_beside):
        found.append(f"{name}: a bias of B needs a LoRA change at the same site")
    if not found and site.kind == "vector_layer" and not _works_by_token(module):
        found.append(
            f"{name}: {type(module).__name__} does not compute its tokens independently, so adapters cannot share it"
        )
    return found


def _other_width(site: Site, value: Tensor) -> str:
    """The meaning of a classifier's head that reads states of another width."""
    if not site.is_classifier or value.dim() != 2:
        return ""
    return f"; the head was trained on a base with {value.shape[1]} features, this one has {site.geometry.in_}"


def _expected(module: Any, site: Site, key: str, tokens: tuple[int, ...]) -> tuple[int, ...] | None:
    if key == ROWS:
        vocabulary = site.kind in ("embedding", "linear")
        return (len(tokens), site.dense.shape[1]) if vocabulary else None
    if key == LORA_BIAS:
        return (site.geometry.out,)
    if key == WEIGHT and site.layer_kind.quantized(module) is not None:
        return (site.geometry.out, site.geometry.in_)
    parameter = getattr(module, key, None) if key in KINDS else None
    return tuple(parameter.shape) if isinstance(parameter, Tensor) else None


@torch.no_grad()
def _works_by_token(module: nn.Module) -> bool:
    """True if a layer computes the tokens of [B, T, d] as those of [B * T, d]."""
    first = next(module.parameters(recurse=False))
    if first.is_meta:
        return True
    x = torch.linspace(-1, 1, 6 * first.shape[0], device=first.device).sin().to(first.dtype).reshape(2, 3, -1)
    try:
        batch, tokens = computed_with(module, {}, x), computed_with(module, {}, x.reshape(6, -1))
    except Exception:
        return False
    return batch.shape == x.shape and bool(torch.allclose(batch.reshape(6, -1), tokens, rtol=1e-2, atol=1e-3))


def override_matrix(adapter: Adapter, site: str) -> Tensor | None:
    """The override of a matrix, or of rows of it, at a site, or None."""
    tensors = adapter.overrides.get(site, {})
    return tensors.get(WEIGHT, tensors.get(ROWS))


def matrix_deltas(adapter: Adapter, site: Site) -> list[Tensor]:
    """The change of an adapter's overridden matrix or rows in the weight of a site, as [out, in], fp32 or wider."""
    tensors = adapter.overrides[site.name]
    base = site.dense
    wide = torch.promote_types(base.dtype, torch.float32)
    found = []
    if WEIGHT in tensors:
        found.append(tensors[WEIGHT].detach().to(base.device, wide) - base.to(wide))
    if ROWS in tensors:
        ids = torch.tensor(adapter.tokens[site.name], device=base.device)
        change = torch.zeros_like(base, dtype=wide)
        found.append(change.index_copy_(0, ids, tensors[ROWS].detach().to(base.device, wide) - base[ids].to(wide)))
    turned = site.kind in ("embedding", "conv1d")
    return [delta.T if turned else delta.flatten(1) for delta in found]


def vector_deltas(adapter: Adapter, site: Site) -> dict[str, Tensor]:
    """The change of an adapter's overrides in a layer's vectors: {"weight" (of a vector layer), "bias": change}, fp32 or wider."""
    tensors = adapter.overrides.get(site.name, {})
    found: dict[str, Tensor] = {}
    for key in (WEIGHT, BIAS) if site.kind == "vector_layer" else (BIAS,):
        if key in tensors:
            base = getattr(site.module, key).detach()
            wide = torch.promote_types(base.dtype, torch.float32)
            found[key] = tensors[key].detach().to(base.device, wide) - base.to(wide)
    if LORA_BIAS in tensors:
        change = adapter.scale(site.name) * tensors[LORA_BIAS].detach().float()
        found[BIAS] = found[BIAS] + change.to(found[BIAS]) if BIAS in found else change
    bias = getattr(site.module, BIAS, None)
    if site.name in adapter.tensors and isinstance(bias, Tensor):
        moved = adapter.method.bias_delta(adapter.tensors[site.name], bias.detach())
        if moved is not None:
            found[BIAS] = found.get(BIAS, torch.zeros_like(moved)) + moved
    return found


def fresh_overrides(
    model: nn.Module, survey: Survey, method: Method, chosen: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """(overrides, tokens) of a new adapter by its options: the base's values, to train from.

    Raises TargetError with every name that fits nothing or names what cannot be trained so.
    """
    problems = Problems()
    found: dict[str, dict[str, Tensor]] = {}
    for pattern in as_list(method.modules_to_save):
        for site in _sites_of(pattern, model, survey, problems):
            found.setdefault(site.name, _fresh_layer(site))
    for name, keys in method.copies(survey, chosen).items():
        site = survey.site(name)
        if site.reason or (keys == (BIAS,) and not isinstance(getattr(site.module, BIAS, None), Tensor)):
            continue
        if site.stack is not None or not site.layer_kind.is_layer:
            what = "stacked experts" if site.stack is not None else "routers that choose the experts"
            problems.add(f"{name}: parameters of {what} cannot be trained so; choose other layers, or no biases")
            break
        found[name] = {**_fresh_layer(site, keys), **found.get(name, {})}
    for name in chosen if method.adds_bias else ():
        site = survey.sites[name]
        if site.kind != "embedding":
            found.setdefault(name, {})[LORA_BIAS] = torch.zeros(site.geometry.out)
    tokens = _fresh_rows(model, survey, method, found, problems)
    if method.ensure_weight_tying:
        _share_with_heads(survey, found)
    problems.raise_if_any(TargetError, "the adapter's overrides cannot be chosen")
    return found, tokens


def fresh_head(survey: Survey, outputs: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """The overrides of a new classifier's head: {layer: {"weight", "bias"}}.

    Layers behind the model's body are drawn by ``seed``, N(0, 0.02^2) with biases of zero; norms, and a pooler of the body, start from the
    base's values. ``outputs``: number of outputs of the last layer.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name in survey.head:
        site = survey.site(name)
        values = found[name] = fresh_values(site, (WEIGHT, BIAS))
        if site.kind == "vector_layer" or "pooler" in name.split("."):
            continue
        rows = outputs if site.is_classifier else site.geometry.out
        generator = torch.Generator().manual_seed(stream_seed(seed, name, "head"))
        drawn = torch.empty(rows, *values[WEIGHT].shape[1:], dtype=values[WEIGHT].dtype)
        found[name] = {WEIGHT: drawn.normal_(0, _HEAD_SPREAD, generator=generator)}
        if BIAS in values:
            found[name][BIAS] = drawn.new_zeros(rows)
    return found


def _sites_of(pattern: str, model: nn.Module, survey: Survey, problems: Problems) -> list[Site]:
    """The layers at and below every module that a name in ``modules_to_save`` means."""
    tops = [path for path, _ in model.named_modules() if path and matches(pattern, path)]
    if not tops:
        problems.add(f'modules_to_save: "{pattern}" matches nothing')
    found: dict[str, Site] = {}
    for top in tops:
        for path, module in model.get_submodule(top).named_modules():
            full = f"{top}.{path}" if path else top
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            site = survey.sites.get(full) or survey.vector_layers.get(full)
            if site is None:
                problems.add(
                    f'modules_to_save: "{pattern}" names {full}, a {type(module).__name__}, which cannot be trained for one adapter'
                )
            else:
                found[full] = site
    return list(found.values())


def _fresh_layer(site: Site, keys: Collection[str] = (WEIGHT, BIAS)) -> dict[str, Tensor]:
    """Copies of these parameters of a layer, a quantized weight dequantized."""
    values = fresh_values(site, keys)
    if WEIGHT in keys and site.layer_kind.quantized(site.module) is not None:
        values[WEIGHT] = site.dense.to("cpu", torch.promote_types(site.dtype, torch.float32))
    return values


def _fresh_rows(
    model: nn.Module, survey: Survey, method: Method, overrides: dict[str, dict[str, Tensor]], problems: Problems
) -> dict[str, tuple[int, ...]]:
    ids = tuple(method.trainable_token_indices)
    if not ids:
        return {}
    get = getattr(model, "get_input_embeddings", None)
    module = get() if callable(get) else None
    site = next((site for site in survey.sites.values() if site.module is module), None)
    if site is None:
        problems.add("trainable_token_indices: the model does not say which its input embedding is")
        return {}
    if len(set(ids)) < len(ids) or max(ids) >= site.weight.shape[0]:
        problems.add(
            f"trainable_token_indices: expected distinct tokens below {site.weight.shape[0]:,}, found {list(ids)[:8]}"
        )
        return {}
    with site.whole():
        rows = site.weight.detach()[torch.tensor(ids, device=site.weight.device)].to(
            "cpu", torch.promote_types(site.weight.dtype, torch.float32), copy=True
        )
    shared = [site.name, *(other.name for other in survey.sites.values() if other.tied_to == site.name)]
    names = [name for name in shared if WEIGHT not in overrides.get(name, {})]
    for name in names:
        overrides.setdefault(name, {})[ROWS] = rows
    return dict.fromkeys(names, ids)


def _share_with_heads(survey: Survey, overrides: dict[str, dict[str, Tensor]]) -> None:
    """Let a head that shares the base's embedding share the adapter's embedding too."""
    for site in survey.sites.values():
        if site.tied_to in overrides and WEIGHT in overrides[site.tied_to]:
            overrides[site.name] = {**overrides.get(site.name, {}), WEIGHT: overrides[site.tied_to][WEIGHT]}


def fresh_values(site: Site, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of a layer's own parameters, in fp32 or wider, to train from."""
    with site.whole():
        known = {name: value.detach() for name, value in site.module.named_parameters(recurse=False) if name in names}
    return {
        name: value.to("meta" if value.is_meta else "cpu", torch.promote_types(value.dtype, torch.float32), copy=True)
        for name, value in known.items()
    }
