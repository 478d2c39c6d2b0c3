"""Finding the sites of a model: one walk, and for each layer the kind that adapters can act on it as.

A subclass with a forward of its own counts as its parent only if it is seen to compute the same. A layer or parameter that looks like a
site but is none is kept with its reason, so that a pattern that names it gets an answer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.layers.experts import (
    ExpertLinear,
    ExpertsKind,
    QuantizedExpertKind,
    active_experts,
    experts_kind_for,
)
from veneer.adapters.layers.fused import fused_parts
from veneer.adapters.layers.kinds import (
    Conv1DKind,
    Conv2dKind,
    EmbeddingKind,
    LayerKind,
    ScaledEmbeddingKind,
    VectorKind,
)
from veneer.adapters.layers.quantized import QuantizedLinearKind
from veneer.adapters.layers.roles import mark_roles
from veneer.adapters.layers.routers import expert_counts, experts_chosen, router_kind_for
from veneer.adapters.layers.site import Site, Survey
from veneer.kernels.quantized.bitsandbytes import keep_packing, quantized_layer
from veneer.kernels.quantized.stack import QuantizedStack
from veneer.kernels.quantized.torchao import torchao_problem, torchao_weight

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "output_layer")
_HEAD_PARTS = ("pooler",)
"""Modules inside a base's body that compute the input of its head."""
_KINDS: dict[str, LayerKind] = {kind.kind: kind for kind in (LayerKind(), Conv1DKind(), EmbeddingKind(), Conv2dKind())}
_SCALED = ScaledEmbeddingKind()
_QUANTIZED = QuantizedLinearKind()
_QUANTIZED_EXPERT = QuantizedExpertKind()
_VECTOR = VectorKind()
_MIXTURE = LayerKind()


def survey(model: nn.Module) -> Survey:
    """Walk a model once and find every site and vector layer.

    Modules that appear under two names count once, under the first; modules that share a weight tensor are listed in ``tied``.
    """
    blocks = _block_indices(model)
    task_head = _task_head(model)
    heads = _heads(model) | task_head
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    sites: dict[str, Site] = {}
    vector_layers: dict[str, Site] = {}
    stacks: dict[str, Site] = {}
    uncovered: dict[str, str] = {}
    by_weight: dict[int, list[str]] = {}
    counts = expert_counts({path: module for module, (path, *_) in names.items()})
    for module, (name, *others) in names.items():
        if isinstance(module, QuantizedStack):
            continue  # a parameter of a stack of experts
        kind, reason = layer_kind_for(module)
        count = experts_chosen(name, counts)
        router = router_kind_for(module, count) if kind is None else None
        kind, reason = (router, "") if router is not None else (kind, reason)
        if reason:
            uncovered[name] = reason
        elif isinstance(kind, ExpertsKind):
            stacks[name] = stack = _stack_site(name, module, kind, model, blocks, tuple(others))
            sites.update(_expert_sites(stack, active_experts(module, model)))
            continue
        elif kind is None:
            uncovered.update(_weights_without_kind(name, module))
            kind = _VECTOR if is_vector_layer(module) else None
        if kind is None:
            continue
        block = _block_of(name, blocks)
        path, _, tail = name.rpartition(".")
        is_head = module in task_head or (
            kind is not _VECTOR and (module in heads or (block is None and tail in HEAD_NAMES))
        )
        parent = model.get_submodule(path) if name else None
        site = Site(name, module, kind, block is not None, block, is_head, parent=parent, names=(name, *others))
        site.in_body = not is_head and _in_body(name, model)
        site.is_router = kind.kind == "linear" and site.geometry.out == count
        if kind.kind in ("linear", "conv1d"):
            site.parts = fused_parts(name, site.geometry.out, model)
        (vector_layers if kind is _VECTOR else sites)[name] = site
        if kind is not _VECTOR:
            weight: Any = module.weight
            by_weight.setdefault(id(weight), []).append(name)
    tied = {name: tuple(group) for group in by_weight.values() if len(group) > 1 for name in group}
    for name, group in tied.items():
        if sites[name].kind == "linear":
            sites[name].tied_to = next((other for other in group if sites[other].kind == "embedding"), None)
    mark_roles(sites.values())
    embedding = _input_embedding(sites, model)
    if embedding is not None:
        embedding.is_input, embedding.key_values = True, _key_values(model)
    head = tuple(name for name, site in (sites | vector_layers).items() if site.module in task_head)
    _mark_classifier(model, [sites[name] for name in head if name in sites])
    found = Survey(sites, uncovered, tied, vector_layers, stacks, head)
    _find_mixtures(found, names)
    return found


def _input_embedding(sites: dict[str, Site], model: nn.Module) -> Site | None:
    """The layer that embeds the tokens, where the model names it."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        module = get() if callable(get) else None
    except RuntimeError:  # transformers raises a kind of it for a model that names none
        return None
    return next((site for site in sites.values() if site.module is module and site.kind == "embedding"), None)


def _key_values(model: Any) -> tuple[int, int] | None:
    """(layers, features of a layer's keys) of a transformers model whose layers all attend to keys and values of this size, or None."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads, hidden = (
        getattr(text, key, None) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    kinds = getattr(text, "layer_types", None) or ()
    others = any("attention" not in kind or "linear" in kind for kind in kinds)
    declared = text.to_dict() if hasattr(text, "to_dict") else {}
    differing = any(declared.get(key) for key in ("kv_lora_rank", "global_head_dim", "per_layer_config"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)) or others or differing:
        return None
    size = getattr(text, "head_dim", None) or hidden // heads
    return layers, (getattr(text, "num_key_value_heads", None) or heads) * size


def _in_body(name: str, model: nn.Module) -> bool:
    """True for a layer of the model without its head: transformers names the body in ``base_model_prefix``."""
    prefix = getattr(model, "base_model_prefix", "")
    inside = not prefix or not hasattr(model, prefix) or name.startswith(f"{prefix}.")
    return inside and not {*name.split(".")} & {*_HEAD_PARTS}


def _stack_site(
    name: str, module: nn.Module, kind: ExpertsKind, model: nn.Module, blocks: dict[str, int], others: tuple[str, ...]
) -> Site:
    block = _block_of(name, blocks)
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    return Site(name, module, kind, block is not None, block, False, parent=parent, names=(name, *others))


def _expert_sites(stack: Site, active: int) -> dict[str, Site]:
    """The sites of a stack's experts: ``mlp.experts.7.gate_proj``."""
    kind, module = stack.layer_kind, stack.module
    assert isinstance(kind, ExpertsKind)
    found: dict[str, Site] = {}
    for expert in range(kind.count(module)):
        for part in kind.parts(module):
            names = [f"{path}.{expert}.{part.name}".lstrip(".") for path in stack.names]
            layer = ExpertLinear(module, kind, expert, part)
            one = _KINDS["linear"] if layer.quantized is None else _QUANTIZED_EXPERT
            site = Site(names[0], layer, one, stack.in_block, stack.block, False, names=tuple(names))
            site.stack, site.active_experts = stack, active
            site.within = (stack.name, f"{stack.name}.{part.parameter}".lstrip("."))
            found[site.name] = site
    return found


def _find_mixtures(found: Survey, names: dict[nn.Module, list[str]]) -> None:
    """Find the modules around experts that are modules of their own: those that hold the list of experts, or a list with a forward."""
    paths = {path[0]: module for module, path in names.items()}
    mixtures: dict[str, Site] = {}
    for path, experts in paths.items():
        if path.rpartition(".")[2] != "experts" or not isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
            continue
        own = type(experts).forward is not nn.Module.forward
        name = path if own else path.rpartition(".")[0]
        mixtures[path] = found.mixtures.setdefault(name, Site(name, paths[name], _MIXTURE, False, None, False))
    for site in found.every() if mixtures else ():
        parts = site.name.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts)) if parts[end - 1] == "experts")
        site.mixture = next((mixtures[path] for path in above if path in mixtures), None)


def _weights_without_kind(name: str, module: nn.Module) -> dict[str, str]:
    """Matrices of a module that is not a supported layer: another kind of layer, or a bare parameter such as a mixture's
    stacked experts. Position tables and class tokens, stored as [1, n, d], are not matrices."""
    found: dict[str, str] = {}
    for key, parameter in module.named_parameters(recurse=False):
        stacked = parameter.dim() >= 3 and parameter.shape[0] > 1
        layer = key == "weight" and not any(True for _ in module.children())
        if parameter.dim() < 2 or not (stacked or layer or "weight" in key):
            continue
        if layer:
            found[name] = f"{type(module).__name__} layers are not supported"
        else:
            shape = " x ".join(map(str, parameter.shape))
            what = "a stacked parameter" if stacked else "a parameter"
            found[f"{name}.{key}" if name else key] = f"{what} of shape {shape} is not a module and is not supported"
    return found


def _heads(model: nn.Module) -> set[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {head} if isinstance(head, nn.Module) else set()


def _mark_classifier(model: nn.Module, head: list[Site]) -> None:
    """Mark the last layer of a classifier's head, by its number of outputs."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    for site in [site for site in head if site.kind == "linear" and site.geometry.out == labels][-1:]:
        site.is_classifier = True


def _task_head(model: nn.Module) -> set[nn.Module]:
    """Modules of a transformers classifier that stand behind its body, and the body's pooler, which only they read."""
    if not type(model).__name__.endswith(_CLASSIFIERS):
        return set()
    body = str(getattr(model, "base_model_prefix", ""))
    inside = f"{body}."
    return {
        module
        for name, module in model.named_modules()
        if name and name != body and (not name.startswith(inside) or "pooler" in name.split("."))
    }


def _block_indices(model: nn.Module) -> dict[str, int]:
    """Paths of the members of every list of blocks, with their index: ``model.layers.3`` -> 3."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for index, child in enumerate(module):
                if any(True for _ in child.children()):
                    found[f"{name}.{index}" if name else str(index)] = index
    return found


def _block_of(name: str, blocks: dict[str, int]) -> int | None:
    """Index of the outermost block that holds a module, or None."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        index = blocks.get(".".join(parts[:end]))
        if index is not None:
            return index
    return None


def is_vector_layer(module: nn.Module) -> bool:
    """True if a layer without a matrix can have overrides: a leaf with vectors, and no statistics over a batch."""
    parameters = list(module.parameters(recurse=False))
    leaf = not any(True for _ in module.children())
    return leaf and bool(parameters) and all(p.dim() == 1 for p in parameters) and not hasattr(module, "running_mean")


def layer_kind_for(module: nn.Module) -> tuple[LayerKind | None, str]:
    """The layer kind of a module, or None with the reason why a layer with a weight cannot be adapted (empty: not a layer)."""
    if quantized_layer(module):
        keep_packing(module)
        reason = torchao_problem(torchao_weight(module))
        return (None, reason) if reason else (_QUANTIZED, "")
    kind, reason = _by_class(module)
    if kind is None:
        return (None, reason) if reason else experts_kind_for(module)
    weight = module._parameters.get("weight")
    if weight is None:
        return None, "its weight is computed from other parameters (a parametrization, weight norm or pruning)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return None, "its weight has no shape before the first forward; run the model once before attaching"
    if not weight.is_floating_point():
        return None, f"its weight is stored as {weight.dtype}, in a quantized format that is not supported"
    return kind, ""


def _by_class(module: nn.Module) -> tuple[LayerKind | None, str]:
    cls = type(module)
    if isinstance(module, nn.Linear):
        return _like(module, nn.Linear, "linear")
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return _KINDS["conv1d"], ""
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return None, "nn.Embedding with max_norm rewrites its own weight at every lookup"
        return _like(module, nn.Embedding, "embedding")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return None, "grouped convolutions (groups > 1) are not supported"
        return _like(module, nn.Conv2d, "conv2d")
    return None, ""


def _like(module: nn.Module, parent: type[nn.Module], kind: str) -> tuple[LayerKind | None, str]:
    """The layer kind of this name; for a subclass with its own forward only if that is seen to compute the same.

    Falcon writes the product of nn.Linear anew, Gemma multiplies what nn.Embedding looks up by a constant; another one may compute
    anything, and adapting it as its parent would be a guess.
    """
    cls: Any = type(module)
    if cls.forward is parent.forward:
        return _KINDS[kind], ""
    refused = None, f"{cls.__name__} overrides {parent.__name__}.forward and computes something else"
    if kind == "conv2d":
        return refused
    x = torch.tensor([[0, 2], [1, 3]]) if kind == "embedding" else torch.linspace(-1, 1, 24).view(2, 3, 4)
    try:
        twin = _twin(module)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found, expected = cls.forward(twin, x), parent.forward(twin, x)
            scale = torch.as_tensor(getattr(twin, "embed_scale", 1.0)).to(expected) if kind == "embedding" else None
    except Exception:
        return refused
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return refused
    if torch.allclose(found, expected, atol=1e-6):
        return _KINDS[kind], ""
    if scale is not None and scale.numel() == 1 and torch.allclose(found, expected * scale, atol=1e-6):
        return _SCALED, ""
    return refused


def _twin(module: nn.Module) -> Any:
    """A layer of the same class and settings with small weights, to run without touching the module."""
    twin = copy.copy(module)
    vector = torch.linspace(-0.7, 0.9, 4)
    values = {"weight": torch.outer(torch.linspace(1, 2, 4), vector).sin(), "bias": vector}
    parameters = {name: None if value is None else values[name] for name, value in module._parameters.items()}
    buffers = {
        name: value if value is None else torch.full_like(value, 1.5, device="cpu") if value.is_meta else value.cpu()
        for name, value in module._buffers.items()
    }
    twin.__dict__.update(_parameters=parameters, _buffers=buffers)
    return twin
