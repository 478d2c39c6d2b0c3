"""Sites: the modules of a base that adapters can act on. They are found once, when a bank is attached (``survey.py``).

A site is named by the module's path in the attached model (``model.layers.0.self_attn.q_proj``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.adapters.layers.kinds import Geometry, LayerKind
from veneer.kernels.versions import version_of


@dataclass(eq=False)
class Site:
    """One module that adapters can act on, its layer kind, and the findings of the dry run."""

    name: str
    module: nn.Module
    layer_kind: LayerKind
    in_block: bool
    block: int | None
    is_head: bool
    reason: str = ""
    """The reason why adapters must not act here (found by the dry run); empty where they may."""
    layout: str = ""
    """Order of rows in the layer's input: rows, tokens, blocks, constant (``runtime/plan.py``); "" if unknown."""
    group: tuple[str, ...] = ()
    """Linear sites that read the same input one after the other (q, k, v), this one included."""
    overwritten: bool = True
    """True if the model may write over the layer's output; the dry run shows where it does not."""
    tied_to: str | None = None
    """The embedding that this output head shares its weight with."""
    parent: nn.Module | None = field(default=None, repr=False)
    """The module that holds this one, None for the model itself."""
    names: tuple[str, ...] = ()
    """Every path under which the model has this module; the first is ``name``."""
    calls: int = 0
    """Number of times that the layer was called since adapters act here."""
    within: tuple[str, ...] = ()
    """Names that mean this layer among others: of its stack of experts, and of the fused parameter there."""
    stack: Site | None = None
    """The module of stacked experts that this layer is a part of (``experts.py``); its forward computes this layer."""
    mixture: Site | None = None
    """The module around separate experts that this layer is in: a router picks the tokens that the layer sees (``runtime/mixture.py``)."""
    active_experts: int = 1
    """Number of experts that compute a token, for a layer of an expert: each has this share of an adapter's rank."""
    in_body: bool = True
    """False for the output head and what else stands outside of the model's body (a pooler)."""
    is_classifier: bool = False
    """True for the last layer of a classifier's head: an adapter that overrides it has its own number of outputs."""
    role: str = ""
    """The part of a linear layer in its block (``roles.py``), empty if it is none of those."""
    parts: dict[str, slice] = field(default_factory=dict)
    """Outputs of each projection that a fused linear layer holds, by name (``fused.py``)."""
    is_input: bool = False
    """True for the embedding of the input's tokens."""
    key_values: tuple[int, int] | None = None
    """(layers, features of a layer's keys) of the base, at its input embedding; None elsewhere, and for layers that differ or have none."""
    is_router: bool = False
    """True for a linear layer that chooses a token's experts; all-linear leaves it out."""
    lender: Callable[[nn.Module], AbstractContextManager[None]] | None = field(default=None, repr=False)
    """Makes the module's weights whole where several processes hold parts of them, which nothing changes then."""
    _squared: tuple[object, Tensor, StorageWeakRef | None] | None = field(default=None, repr=False)

    @property
    def host(self) -> Site:
        """The site of the module whose forward computes this layer: itself, or the stack of an expert."""
        return self if self.stack is None else self.stack

    @property
    def hosts(self) -> tuple[Site, ...]:
        """Sites of the modules whose forward takes part in this layer, the innermost first."""
        return (self.host,) if self.mixture is None else (self.host, self.mixture)

    @property
    def is_selected(self) -> bool:
        """True if a router chooses the tokens of this layer (an expert of a mixture); a small batch may have none."""
        return self.stack is not None or self.mixture is not None

    @property
    def parameter(self) -> str:
        """Name in the model of the parameter that holds the weight: of an expert, the fused parameter of its stack."""
        name = getattr(self.module, "part").parameter if self.stack is not None else "weight"  # noqa: B009
        if self.stack is not None and self.layer_kind.quantized(self.module) is not None:
            name += ".weight"
        return f"{self.host.name}.{name}".lstrip(".")

    @property
    def kind(self) -> str:
        """Name of the layer kind: linear, conv1d, embedding, conv2d, vector_layer, experts."""
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
    def device(self) -> torch.device:
        """The device of the base weight."""
        if self.stack is not None and self.layer_kind.quantized(self.module) is not None:
            return self.weight.device
        device: torch.device = getattr(self.host.module, self.parameter.rpartition(".")[2]).device
        return device

    @property
    def is_empty(self) -> bool:
        """True on a base without values, whose shapes are enough for counting and planning."""
        return self.device.type == "meta"

    @property
    def weight_2d(self) -> Tensor:
        """The base weight as a detached view [out, in]; where it is quantized, a new dense one that must not be kept."""
        with self.whole():
            return self.layer_kind.weight_2d(self.module).detach()

    @property
    def dense(self) -> Tensor:
        """The base weight in its stored layout, detached; where it is quantized, a new dense one that must not be kept."""
        with self.whole():
            return self.layer_kind.dense(self.module).detach()

    def whole(self) -> AbstractContextManager[None]:
        """A context in which the weight is whole."""
        return nullcontext() if self.lender is None else self.lender(self.host.module)

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the base weight is computed with."""
        return self.layer_kind.dtype(self.module)

    @property
    def format(self) -> str:
        """The format that the base weight is stored in: float32, bfloat16, nf4 and so on."""
        quantized = self.layer_kind.quantized(self.module)
        return str(self.dtype).removeprefix("torch.") if quantized is None else quantized.format

    def part_paths(self) -> dict[str, str]:
        """{path that means a projection of a fused layer: its name}: ``self_attn.q_proj`` for a part of ``self_attn.qkv_proj``."""
        parents = [name.rpartition(".")[0] for name in self.names]
        return {f"{parent}.{part}".lstrip("."): part for parent in parents for part in self.parts}

    def squared_norms(self) -> Tensor:
        """||W_o||^2 of the base weight, [out], computed once and again only if the weight itself is replaced or cast."""
        if self.lender is not None:  # nothing changes the weight, of which there is only a part here
            if self._squared is None:
                with self.whole(), torch.inference_mode(False), torch.no_grad():
                    self._squared = (None, self.layer_kind.squared_norms(self.module), None)
            return self._squared[1]
        weight = self.weight
        storage = weight.untyped_storage()
        key = (storage._cdata, weight.storage_offset(), version_of(weight), self.dtype, weight.device)
        known = self._squared
        if known is None or known[0] != key:
            # Made outside of inference mode, or no later training step could use it. The weak reference keeps the storage's
            # address from standing for another one while this entry lives.
            with torch.inference_mode(False), torch.no_grad():
                squared = self.layer_kind.squared_norms(self.module)
                known = self._squared = (key, squared, StorageWeakRef(storage))
        return known[1]

    def __post_init__(self) -> None:
        self._shape = getattr(self.module._parameters.get("weight"), "shape", None)

    def is_current(self) -> bool:
        """True if the model still has this module here, with a weight of the same shape."""
        if self.stack is not None:
            return self.stack.is_current()
        if self.parent is not None and self.parent._modules.get(self.name.rpartition(".")[2]) is not self.module:
            return False
        return getattr(self.module._parameters.get("weight"), "shape", None) == self._shape

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in another process or in a copy.
        return {**self.__dict__, "_squared": None}


@dataclass(frozen=True)
class Survey:
    """Sites of a model by name, unsupported layers with their reasons, groups of modules that share one weight, and vector layers (norms),
    where an adapter can have overrides but no low-rank change. Modules of stacked experts are in ``stacks``, their experts' layers among
    the sites. ``mixtures``: modules around experts that are modules of their own. ``head``: the layers of a classifier's head."""

    sites: dict[str, Site]
    uncovered: dict[str, str]
    tied: dict[str, tuple[str, ...]]
    vector_layers: dict[str, Site]
    stacks: dict[str, Site]
    head: tuple[str, ...] = ()
    mixtures: dict[str, Site] = field(default_factory=dict)

    def every(self) -> Iterator[Site]:
        """Sites, then vector layers."""
        yield from self.sites.values()
        yield from self.vector_layers.values()

    def modules(self) -> Iterator[Site]:
        """The sites of modules that the model calls: a stack in place of its experts' layers, and mixtures."""
        yield from (site for site in self.sites.values() if site.stack is None)
        yield from self.stacks.values()
        yield from self.mixtures.values()
        yield from self.vector_layers.values()

    def find(self, name: str) -> Site | None:
        """The site or vector layer of this name, or None."""
        return self.sites.get(name) or self.vector_layers.get(name)

    def site(self, name: str) -> Site:
        """The site or vector layer of this name."""
        return self.sites.get(name) or self.vector_layers[name]
