"""Values of an adapter's own: whole weights, biases and rows that stand in the place of the base's, for that adapter's cells only.

Beside its low-rank changes an adapter may train a head, an embedding, a norm, the biases, or a few tokens' rows. At each such place
the layer's output y for an adapter's cells becomes

    weight      f(x; W')                      the layer's own computation with the adapter's weight
    bias        y + (b' - b)
    rows        the rows of some tokens: of an embedding when they are looked up, of a head as their logits
    lora_bias   y + s c                       a bias of B, scaled with it

and in a weighted mix y + sum_j w_j (y_j - y). The base's tensors are only read. Places are sites, or layers without a host whose
parameters are vectors (norms): `host.VectorKind` stands for these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.targets import as_list, matches
from veneer.errors import Problems, TargetError

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.adapters.methods import Method
    from veneer.adapters.runtime.forward import AdaptedForward
    from veneer.adapters.runtime.forward_pass import Pass
    from veneer.adapters.runtime.mapping import Part

WEIGHT, BIAS, ROWS, LORA_BIAS = "weight", "bias", "rows", "lora_bias"
KINDS = (WEIGHT, BIAS, ROWS, LORA_BIAS)
Own = Mapping[str, Tensor]


def with_own(
    host: AdaptedForward, current: Pass, parts: Iterable[Part], x: Tensor, y: Tensor, *, plain: bool
) -> Tensor:
    """A layer's output with the values of each part's adapter in place. plain: whether ``y`` is the base layer's own output."""
    site = host.site
    x_N = site.layer_kind.flatten(x)
    y_N = y.reshape(x_N.shape[0], *y.shape[y.dim() - (3 if site.kind == "conv2d" else 1) :])
    out = y_N
    for name, rows, weight in parts:
        adapter = host.bank[name]
        x_n = x_N if rows is None else x_N.index_select(0, rows)
        if plain:
            base_n = y_N if rows is None else y_N.index_select(0, rows)
        else:
            base_n = host.base(x_n)
        own_n = _own_output(adapter, site, x_n, base_n)
        if plain and current.chart.apart and isinstance(weight, float) and weight == 1.0:
            # No other adapter has a part in these cells: they take the new values themselves, without a sum to round.
            out = own_n if rows is None else out.index_copy(0, rows, own_n.to(out.dtype))
            continue
        change = own_n - base_n
        change = change * (
            weight.to(change.dtype).reshape(-1, *[1] * (change.dim() - 1)) if isinstance(weight, Tensor) else weight
        )
        out = out + change if rows is None else out.index_add(0, rows, change.to(out.dtype))
    return out.reshape(y.shape)


def _own_output(adapter: Adapter, site: Site, x_n: Tensor, y_n: Tensor) -> Tensor:
    own, module, dtype = adapter.overrides[site.name], site.module, y_n.dtype
    out = y_n
    whole = {key: own[key].to(dtype) for key in (WEIGHT, BIAS) if key in own}
    if WEIGHT in own or (whole and site.kind == "place"):
        out = computed_with(module, whole, x_n)
    elif BIAS in own:
        base: Any = module.bias
        out = out + site.layer_kind.per_output(whole[BIAS] - base)
    if ROWS in own:
        out = _with_rows(site, own[ROWS].to(dtype), adapter.tokens[site.name], x_n, out)
    if LORA_BIAS in own:
        out = out + adapter.scale(site.name) * site.layer_kind.per_output(own[LORA_BIAS].to(dtype))
    return out


def computed_with(module: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's own computation with other parameters. The module itself is not touched: a shallow twin holds the new ones."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    parameters: dict[str, Any] = {**module._parameters, **values}
    twin.__dict__["_parameters"] = parameters
    out: Tensor = type(module).forward(twin, x)
    return out


def _with_rows(site: Site, rows_nD: Tensor, tokens: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    ids = torch.tensor(tokens, device=y.device)
    if site.kind != "embedding":
        bias: Any = site.module.bias
        return y.index_copy(1, ids, F.linear(x, rows_nD, None if bias is None else bias[ids]))
    ascending, order = ids.sort()
    at = torch.searchsorted(ascending, x).clamp_max(len(tokens) - 1)
    hit = ascending[at] == x
    scale = getattr(site.module, "embed_scale", None)
    rows_nD = rows_nD if scale is None else rows_nD * torch.as_tensor(scale).to(rows_nD)
    return torch.where(hit.unsqueeze(1), rows_nD[order[at]], y)


def problems_of(adapter: Adapter, name: str, site: Site | None) -> list[str]:
    """Why the values that an adapter has at a place cannot stand there; empty where they can."""
    own = adapter.overrides[name]
    if site is None:
        return [f"{name}: the base has no layer here that an adapter can have values of its own for"]
    found = [f"{name}: {site.reason}"] if site.reason else []
    module: Any = site.module
    for key, value in own.items():
        expected = _expected(module, site, key, adapter.tokens.get(name, ()))
        if expected is None:
            found.append(f"{name}: the layer has no {key}")
        elif tuple(value.shape) != expected:
            found.append(f"{name}.{key}: expected shape {expected}, found {tuple(value.shape)}")
    if ROWS in own:
        tokens, most = adapter.tokens.get(name, ()), module.weight.shape[0]
        if len(set(tokens)) < len(tokens) or not all(0 <= token < most for token in tokens):
            found.append(f"{name}.rows: expected distinct tokens from 0 to {most - 1}, found {list(tokens)[:8]}")
    if WEIGHT in own and ROWS in own:
        found.append(f"{name}: an adapter cannot have both the weight and rows of it")
    if site.name in adapter.tensors and (
        ROWS in own or (WEIGHT in own and WEIGHT not in adapter.method.overrides_beside)
    ):
        found.append(f"{name}: an adapter cannot both change this weight and have one of its own")
    if LORA_BIAS in own and (name not in adapter.tensors or LORA_BIAS not in adapter.method.overrides_beside):
        found.append(f"{name}: a bias of B needs a LoRA change at the same site")
    if not found and site.kind == "place" and not _works_by_cells(module):
        found.append(
            f"{name}: {type(module).__name__} does not treat every cell for itself, so adapters cannot share it"
        )
    return found


def _expected(module: Any, site: Site, key: str, tokens: tuple[int, ...]) -> tuple[int, ...] | None:
    if key == ROWS:
        vocabulary = site.kind in ("embedding", "linear")
        return (len(tokens), module.weight.shape[1]) if vocabulary else None
    if key == LORA_BIAS:
        return (site.geometry.out,)
    parameter = getattr(module, key, None) if key in KINDS else None
    return tuple(parameter.shape) if isinstance(parameter, Tensor) else None


@torch.no_grad()
def _works_by_cells(module: nn.Module) -> bool:
    """Whether a layer over [B, T, d] does the same to its cells taken one by one."""
    first = next(module.parameters(recurse=False))
    if first.is_meta:
        return True
    x = torch.linspace(-1, 1, 6 * first.shape[0], device=first.device).sin().to(first.dtype).reshape(2, 3, -1)
    try:
        whole, cells = computed_with(module, {}, x), computed_with(module, {}, x.reshape(6, -1))
    except Exception:
        return False
    return whole.shape == x.shape and bool(torch.allclose(whole.reshape(6, -1), cells, rtol=1e-2, atol=1e-3))


def own_matrix(adapter: Adapter, place: str) -> Tensor | None:
    """What stands in for (rows of) a matrix at a place, or None."""
    own = adapter.overrides.get(place, {})
    return own.get(WEIGHT, own.get(ROWS))


def own_deltas(adapter: Adapter, site: Site) -> list[Tensor]:
    """What an adapter's own matrix or rows change in the weight of a site, as [out, in], fp32 or wider."""
    own = adapter.overrides[site.name]
    base = site.weight.detach()
    wide = torch.promote_types(base.dtype, torch.float32)
    found = []
    if WEIGHT in own:
        found.append(own[WEIGHT].detach().to(base.device, wide) - base.to(wide))
    if ROWS in own:
        ids = torch.tensor(adapter.tokens[site.name], device=base.device)
        change = torch.zeros_like(base, dtype=wide)
        found.append(change.index_copy_(0, ids, own[ROWS].detach().to(base.device, wide) - base[ids].to(wide)))
    turned = site.kind in ("embedding", "conv1d")
    return [delta.T if turned else delta.flatten(1) for delta in found]


def vector_changes(adapter: Adapter, site: Site) -> dict[str, Tensor]:
    """What an adapter's own values change in a layer's vectors: {"weight" (of a place), "bias": change}, fp32 or wider."""
    own = adapter.overrides[site.name]
    found: dict[str, Tensor] = {}
    for key in (WEIGHT, BIAS) if site.kind == "place" else (BIAS,):
        if key in own:
            base = getattr(site.module, key).detach()
            wide = torch.promote_types(base.dtype, torch.float32)
            found[key] = own[key].detach().to(base.device, wide) - base.to(wide)
    if LORA_BIAS in own:
        change = adapter.scale(site.name) * own[LORA_BIAS].detach().float()
        found[BIAS] = found[BIAS] + change.to(found[BIAS]) if BIAS in found else change
    return found


def fresh_own(
    model: nn.Module, survey: Survey, method: Method, chosen: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[int, ...]]]:
    """(values, tokens) of a new adapter's own by its options: the base's values, to train from.

    Raises TargetError with every name that fits nothing or names what cannot be trained so.
    """
    problems = Problems()
    own: dict[str, dict[str, Tensor]] = {}
    for pattern in as_list(method.modules_to_save):
        for place in _places_of(pattern, model, survey, problems):
            own.setdefault(place.name, fresh_values(place.module, (WEIGHT, BIAS)))
    biased = (
        survey.every() if method.bias == "all" else (survey.sites[name] for name in chosen if method.bias != "none")
    )
    for site in biased:
        if isinstance(getattr(site.module, BIAS, None), Tensor) and not site.reason:
            own.setdefault(site.name, {}).setdefault(BIAS, fresh_values(site.module, (BIAS,))[BIAS])
    for name in chosen if method.lora_bias else ():
        site = survey.sites[name]
        if site.kind != "embedding":
            own.setdefault(name, {})[LORA_BIAS] = torch.zeros(site.geometry.out)
    tokens = _fresh_rows(model, survey, method, own, problems)
    if method.ensure_weight_tying:
        _share_with_heads(survey, own)
    problems.raise_if_any(TargetError, "what the adapter shall have of its own cannot be chosen")
    return own, tokens


def _places_of(pattern: str, model: nn.Module, survey: Survey, problems: Problems) -> list[Site]:
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


def _fresh_rows(
    model: nn.Module, survey: Survey, method: Method, own: dict[str, dict[str, Tensor]], problems: Problems
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
    rows = site.weight.detach()[list(ids)].to("cpu", torch.promote_types(site.weight.dtype, torch.float32), copy=True)
    places = [site.name, *(other.name for other in survey.sites.values() if other.tied_to == site.name)]
    names = [name for name in places if WEIGHT not in own.get(name, {})]
    for name in names:
        own.setdefault(name, {})[ROWS] = rows
    return dict.fromkeys(names, ids)


def _share_with_heads(survey: Survey, own: dict[str, dict[str, Tensor]]) -> None:
    """A head that shares the base's embedding shares the adapter's own embedding too."""
    for site in survey.sites.values():
        if site.tied_to in own and WEIGHT in own[site.tied_to]:
            own[site.name] = {**own.get(site.name, {}), WEIGHT: own[site.tied_to][WEIGHT]}


def fresh_values(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of a layer's own parameters, in fp32 or wider, to train from."""
    own = dict(module.named_parameters(recurse=False))
    return {
        name: own[name].detach().to("cpu", torch.promote_types(own[name].dtype, torch.float32), copy=True)
        for name in names
        if name in own
    }
