"""Sites: the places in a base that adapters can act on, found once when a bank is attached.

A site is named by the module's path in the attached model (``model.layers.0.self_attn.q_proj``). What looks like a place but cannot
be one is kept with its reason, so that asking for it gives an answer and passing over it can be said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.adapters.layers.kinds import PLACE, Geometry, LayerKind, is_vector_layer, layer_kind_for
from veneer.kernels.lora.dora_norm import squared_row_norms

HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "output_layer")


@dataclass(eq=False)
class Site:
    """One place: the module that stands there, its host and what is known of it."""

    name: str
    module: nn.Module
    layer_kind: LayerKind
    in_block: bool
    block: int | None
    is_head: bool
    reason: str = ""
    """Why an adapter must not act here (found by the probe); empty where it may."""
    layout: str = ""
    """How rows lie in the layer's input, as the probe saw it: rows, tokens, blocks, constant (see ``passes.py``); "" if unknown."""
    group: tuple[str, ...] = ()
    """Linear sites that read the same input one after the other (q, k, v), this one among them, as the probe saw them."""
    overwritten: bool = True
    """Whether the model may go on in place on the layer's output; the probe shows where it does not."""
    tied_to: str | None = None
    """The embedding that this output head shares its weight with."""
    parent: nn.Module | None = field(default=None, repr=False)
    """The module that holds this one, None for the model itself."""
    names: tuple[str, ...] = ()
    """Every path under which the model has this module; the first is ``name``."""
    _squared: tuple[object, Tensor, StorageWeakRef] | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """The host's kind: linear, conv1d, embedding, conv2d."""
        return self.layer_kind.kind

    @property
    def geometry(self) -> Geometry:
        """Shapes at this site."""
        return self.layer_kind.geometry(self.module)

    @property
    def weight(self) -> Tensor:
        """The base weight as it is stored."""
        return cast(Tensor, self.module.weight)

    @property
    def weight_2d(self) -> Tensor:
        """The base weight as a detached view [out, in]."""
        return self.layer_kind.weight_2d(self.module).detach()

    def squared_norms(self) -> Tensor:
        """||W_o||^2 of the base weight, [out], computed once and again only if the weight itself is replaced or cast."""
        weight = self.weight
        storage = weight.untyped_storage()
        version = 0 if weight.is_inference() else weight._version
        key = (storage._cdata, weight.storage_offset(), version, weight.dtype, weight.device)
        known = self._squared
        if known is None or known[0] != key:
            # Made outside of inference mode, or no later training step could use it. The weak reference keeps the storage's
            # address from standing for another one while this entry lives.
            with torch.inference_mode(False), torch.no_grad():
                known = self._squared = (key, squared_row_norms(self.weight_2d), StorageWeakRef(storage))
        return known[1]

    def __post_init__(self) -> None:
        self._shape = getattr(self.module._parameters.get("weight"), "shape", None)

    def stands(self) -> bool:
        """Whether the model still has this very module here, with a weight of the same shape."""
        if self.parent is not None and self.parent._modules.get(self.name.rpartition(".")[2]) is not self.module:
            return False
        return getattr(self.module._parameters.get("weight"), "shape", None) == self._shape

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in another process or in a copy.
        return {**self.__dict__, "_squared": None}


@dataclass(frozen=True)
class Survey:
    """What a model offers: sites by name, what has no host and why, groups of modules that share one weight, and places where an
    adapter can have values of its own though no low-rank change acts there (norms)."""

    sites: dict[str, Site]
    uncovered: dict[str, str]
    tied: dict[str, tuple[str, ...]]
    vector_layers: dict[str, Site]

    def every(self) -> Iterator[Site]:
        """Sites, then places."""
        yield from self.sites.values()
        yield from self.vector_layers.values()


def survey(model: nn.Module) -> Survey:
    """Walk a model once and name every place that an adapter could act on.

    Modules that appear under two names count once, under the first; modules that share a weight tensor are listed in ``tied``.
    """
    blocks = _block_indices(model)
    heads = _heads(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    sites: dict[str, Site] = {}
    places: dict[str, Site] = {}
    uncovered: dict[str, str] = {}
    by_weight: dict[int, list[str]] = {}
    for module, (name, *others) in names.items():
        host, reason = layer_kind_for(module)
        if host is not None:
            block = _block_of(name, blocks)
            is_head = module in heads or (block is None and name.rpartition(".")[2] in HEAD_NAMES)
            parent = model.get_submodule(name.rpartition(".")[0]) if name else None
            sites[name] = Site(
                name, module, host, block is not None, block, is_head, parent=parent, names=(name, *others)
            )
            weight: Any = module.weight
            by_weight.setdefault(id(weight), []).append(name)
        elif reason:
            uncovered[name] = reason
        else:
            uncovered.update(_weights_without_host(name, module))
            if is_vector_layer(module):
                parent = model.get_submodule(name.rpartition(".")[0]) if name else None
                block = _block_of(name, blocks)
                places[name] = Site(
                    name, module, PLACE, block is not None, block, False, parent=parent, names=(name, *others)
                )
    tied = {name: tuple(group) for group in by_weight.values() if len(group) > 1 for name in group}
    for name, group in tied.items():
        if sites[name].kind == "linear":
            sites[name].tied_to = next((other for other in group if sites[other].kind == "embedding"), None)
    return Survey(sites, uncovered, tied, places)


def _weights_without_host(name: str, module: nn.Module) -> dict[str, str]:
    """Matrices of a module that is no layer with a host: a kind of layer that has none, or a bare parameter such as a mixture's
    stacked experts. Position tables and class tokens, stored as [1, n, d], are no matrices."""
    found: dict[str, str] = {}
    for own, parameter in module.named_parameters(recurse=False):
        stacked = parameter.dim() >= 3 and parameter.shape[0] > 1
        layer = own == "weight" and not any(True for _ in module.children())
        if parameter.dim() < 2 or not (stacked or layer or "weight" in own):
            continue
        if layer:
            found[name] = f"{type(module).__name__} layers have no host"
        else:
            shape = " x ".join(map(str, parameter.shape))
            what = "a stacked parameter" if stacked else "a parameter"
            found[f"{name}.{own}" if name else own] = (
                f"{what} of shape {shape} is no module, and there is no host for it"
            )
    return found


def _heads(model: nn.Module) -> set[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {head} if isinstance(head, nn.Module) else set()


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
