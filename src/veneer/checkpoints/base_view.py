"""A view of the base that adapters are read for and written from: of an attached model, or of a base that is not in memory.

`BaseView` answers for an unknown base: it has no layers, infers kinds and shapes from an adapter's tensors, and refuses nothing.
`AttachedBase` answers from the model. Both are read-only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.adapters.layers.experts import ExpertsKind, Part
from veneer.adapters.layers.kinds import Geometry
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.overrides import BIAS, LORA_BIAS, WEIGHT, problems_of
from veneer.checkpoints.findings import shown
from veneer.models.names import current_layers, expert_names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StackLayout:
    """Shapes of stacked experts: their number, and of each fused parameter (out, in, parts), in the order of their declaration.

    exchanged: the weights are stored [in, out] and the module does not say so, whereupon PEFT takes inputs for outputs.
    """

    count: int
    parameters: Mapping[str, tuple[int, int, tuple[Part, ...]]]
    exchanged: bool = False

    def parts(self, parameter: str) -> tuple[Part, ...]:
        """The parts of a fused parameter; none if the stack has no such parameter."""
        return self.parameters[parameter][2] if parameter in self.parameters else ()

    def has(self, part: str) -> bool:
        """True if the experts have this projection."""
        return any(part == one.name for _, _, parts in self.parameters.values() for one in parts)

    def size(self, part: Part) -> int:
        """Number of outputs of a part."""
        return len(range(self.parameters[part.parameter][0])[part.columns])


class BaseView:
    """An unknown base: a folder is taken as it is."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.sites: Mapping[str, Site] = {}
        self.vector_layers: Mapping[str, Site] = {}
        self.tied: Mapping[str, tuple[str, ...]] = {}
        self.paths: tuple[str, ...] = ()

    def layers(self) -> Iterator[Site]:
        """Sites, then the layers whose parameters are vectors."""
        yield from self.sites.values()
        yield from self.vector_layers.values()

    def layer(self, name: str) -> Site | None:
        """The site or vector layer of this name."""
        return self.sites.get(name) or self.vector_layers.get(name)

    def parameters_of(self, name: str) -> dict[str, Tensor]:
        """A layer's own parameters by name; empty if the base has no such layer."""
        layer = self.layer(name)
        return dict(layer.module.named_parameters(recurse=False)) if layer is not None else {}

    def tied_to(self, site: str) -> str | None:
        """The embedding that an output head shares its weight with."""
        return self.sites[site].tied_to if site in self.sites else None

    def master_dtype(self, sites: Iterable[str]) -> torch.dtype:
        """The dtype of an adapter's masters: fp32, or fp64 on an fp64 base."""
        dtypes = {self.sites[site].dtype for site in sites if site in self.sites}
        return torch.float64 if dtypes == {torch.float64} else torch.float32

    def current_layers(self, layers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Names here of layers that a file names otherwise: (by transformers' table, of a text model's in a multimodal one)."""
        return {}, {}

    def holder(self, layer: str, tensor: str) -> str:
        """The layer that holds a parameter which the model also has under another path (BERT's decoder bias)."""
        return layer

    def is_vocabulary(self, site: str) -> bool:
        """A layer is an embedding or output head, whose weight PEFT may write without being asked to."""
        return site.rpartition(".")[2] in ("embed_tokens", "lm_head")

    def is_expert(self, site: str) -> bool:
        """True if a site is a part of stacked experts."""
        return site in self.sites and self.sites[site].stack is not None

    def stack_layout(self, path: str) -> StackLayout | None:
        """The layout of the stacked experts at a path; None where there are none, or where the base is not known."""
        return None

    def site_of(self, name: str) -> str:
        """The site that a file means by a name: the name itself, or what the base's own files call an expert's layer."""
        return name

    def written_name(self, site: str) -> str:
        """The name of a site in adapter files: that of its weight in the base's own files, for an expert's layer."""
        return site

    def expert_names(self, sites: Iterable[str]) -> dict[str, dict[str, str]]:
        """Names of experts in an adapter file, by which a receipt finds their sites; empty where they are the model's own."""
        stacks, parts = {}, {}
        for site in sites:
            written = self.written_name(site)
            if written != site:
                stacks[written.rsplit(".", 2)[0]] = site.rsplit(".", 2)[0]
                parts[written.rpartition(".")[2]] = site.rpartition(".")[2]
        return {"stacks": stacks, "parts": parts} if stacks else {}

    def holds(self, site: str, weight: Tensor) -> bool | None:
        """The base's weight equals this one; None if that is not known."""
        return None

    # Reasons that something cannot be loaded: a sentence that begins with the layer or tensor, or "".

    def site_problem(self, site: str, *, suggest: bool) -> str:
        """The reason that no adapter can act at a site. suggest: look for a similar name."""
        return ""

    def is_classifier(self, layer: str) -> bool:
        """True for the last layer of a classifier's head."""
        return False

    def kind(self, site: str, shapes: Mapping[str, Shape], *, fan_in_fan_out: bool) -> str:
        """The layer kind of a site. shapes: those of its factors in the file."""
        if any("embedding" in name for name in shapes):
            return "embedding"
        if any(len(shape) == 4 for shape in shapes.values()):
            return "conv2d"
        return "conv1d" if fan_in_fan_out else "linear"

    def geometry(self, site: str, told: Geometry) -> Geometry:
        """Shapes at a site. told: the shapes that its tensors in the file tell."""
        return told

    def override_problem(self, layer: str, name: str, tensor: str, shape: Shape | None) -> str:
        """The reason that an adapter cannot override a parameter of a layer. tensor: its name in the file. shape: None for rows of it."""
        return ""

    def rows_problem(self, layer: str, tensor: str, tokens: Iterable[int]) -> str:
        """The reason that an adapter cannot override the rows of these tokens."""
        return ""

    def misfits(self, adapter: Adapter) -> list[str]:
        """The reasons that an adapter's overrides cannot be used."""
        return []

    def missing_overrides(self, names: Iterable[str], overrides: Mapping[str, Mapping[str, object]]) -> list[str]:
        """Parameters that ``modules_to_save`` declares by these names and the overrides lack."""
        return [] if overrides else list(names)

    def meaningful(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names of ``modules_to_save`` that mean a layer; PEFT adds the usual heads' names to every classifier."""
        return tuple(names)


class SkeletonView(BaseView):
    """A base whose sites are known, with or without weights in memory."""

    model: nn.Module

    def __init__(self, model: nn.Module, survey: Survey) -> None:
        self.model = model
        self.sites = survey.sites
        self.vector_layers = survey.vector_layers
        self.tied = survey.tied
        self.paths = tuple(path for path, _ in model.named_modules())
        self._uncovered = survey.uncovered
        self._stacks = survey.stacks

    def is_classifier(self, layer: str) -> bool:
        return layer in self.sites and self.sites[layer].is_classifier

    def stack_layout(self, path: str) -> StackLayout | None:
        stack = self._stacks.get(path)
        if stack is None or not isinstance(stack.layer_kind, ExpertsKind):
            return None
        kind, module = stack.layer_kind, stack.module
        parts: dict[str, tuple[Part, ...]] = {}
        for part in kind.parts(module):
            parts[part.parameter] = (*parts.get(part.parameter, ()), part)
        weights = {name: kind.fused(module, name, 0) for name in parts}
        shapes = {name: (w.shape[0], w.shape[1], parts[name]) for name, w in weights.items()}
        exchanged = kind.transposed(module) and not getattr(module, "is_transposed", False)
        return StackLayout(kind.count(module), shapes, exchanged)

    def site_of(self, name: str) -> str:
        return name if name in self.sites or not self._stacks else self._names_in_files[1].get(name, name)

    def written_name(self, site: str) -> str:
        return self._names_in_files[0].get(site, site) if self._stacks else site

    @cached_property
    def _names_in_files(self) -> tuple[dict[str, str], dict[str, str]]:
        """({site of an expert: its name in the base's own files}, the inverse)."""
        written = {
            name.removesuffix(".weight"): file.removesuffix(".weight")
            for name, file in expert_names(self.model, [stack.name for stack in self._stacks.values()]).items()
        }
        written = {site: file for site, file in written.items() if site in self.sites}
        return written, {file: site for site, file in written.items()}


class AttachedBase(SkeletonView):
    """The base of a bank."""

    def __init__(self, bank: Bank) -> None:
        super().__init__(bank.model, bank.survey)

    def current_layers(self, layers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        others = sorted(set(layers).difference(self.paths, self.sites))
        # Without the names by which the base's files call an expert's layer.
        unknown = [name for name in others if self.site_of(name) == name]
        return current_layers(self.model, unknown) if unknown else ({}, {})

    def holder(self, layer: str, tensor: str) -> str:
        if self.layer(layer) is not None:
            return layer
        try:
            parameter = getattr(self.model.get_submodule(layer), tensor, None)
        except AttributeError:
            return layer
        sites = self.sites.values() if parameter is not None else ()
        return next((site.name for site in sites if getattr(site.module, tensor, None) is parameter), layer)

    def is_vocabulary(self, site: str) -> bool:
        return site in self.sites and (self.sites[site].kind == "embedding" or self.sites[site].is_head)

    def holds(self, site: str, weight: Tensor) -> bool | None:
        base = self.sites[site].dense
        return torch.equal(weight.to(base), base)

    def site_problem(self, site: str, *, suggest: bool) -> str:
        if site in self.sites:
            reason = self.sites[site].reason
            return f"{shown(site)} cannot be adapted: {reason}" if reason else ""
        why = next((text for path, text in self._uncovered.items() if f"{path}.".startswith(f"{site}.")), None)
        if why is not None:
            return f"{shown(site)} cannot be adapted: {why}"
        near = get_close_matches(site[:512], self.sites, n=1, cutoff=0.8) if suggest and len(self.sites) < 2000 else []
        return f"{shown(site)}: the base has no such layer" + (f" (the nearest is {near[0]})" if near else "")

    def kind(self, site: str, shapes: Mapping[str, Shape], *, fan_in_fan_out: bool) -> str:
        return self.sites[site].kind

    def geometry(self, site: str, told: Geometry) -> Geometry:
        return self.sites[site].geometry

    def override_problem(self, layer: str, name: str, tensor: str, shape: Shape | None) -> str:
        site = self.layer(layer)
        if site is None:
            return (
                f"{shown(layer)}: the base has no layer here that an adapter can override; a head stays in its adapter (veneer predict), "
                "unless the base has one of this name"
            )
        parameter = self.parameters_of(layer).get(name)
        if parameter is None and name != LORA_BIAS:
            return f"{shown(layer)}: the base's layer has no {name}"
        expected = (site.geometry.out,) if parameter is None else tuple(parameter.shape)
        if shape is None or shape == expected:
            return ""
        resized = shape[1:] == expected[1:]
        if site.is_classifier:  # a head has its own number of labels
            if resized:
                return ""
            return (
                f"{shown(tensor)}: expected shape {expected}, found {shape}; the head was trained on a base with {shape[-1]} features, "
                f"this one has {expected[-1]}"
            )
        if resized and name == WEIGHT and self.is_vocabulary(layer):
            return _other_vocabulary(tensor, shape[0], expected[0])
        return f"{shown(tensor)}: expected shape {expected}, found {shape}"

    def rows_problem(self, layer: str, tensor: str, tokens: Iterable[int]) -> str:
        problem = self.override_problem(layer, WEIGHT, tensor, None)
        if problem:
            return problem
        rows, highest = self.parameters_of(layer)[WEIGHT].shape[0], max(tokens, default=0)
        if highest < rows:
            return ""
        return (
            f"{shown(tensor)} has a row for token {highest:,}, the base has {rows:,}: the adapter was made on a resized vocabulary; "
            f"resize the base first: model.resize_token_embeddings({highest + 1}) or more"
        )

    def misfits(self, adapter: Adapter) -> list[str]:
        return [problem for name in adapter.overrides for problem in problems_of(adapter, name, self.layer(name))]

    def missing_overrides(self, names: Iterable[str], overrides: Mapping[str, Mapping[str, object]]) -> list[str]:
        saved = [layer.name for layer in self.layers() if any(inside(layer.name, name) for name in names)]
        return [
            f"{name}.{key}"
            for name in saved
            for key in self.parameters_of(name)
            if key in (WEIGHT, BIAS) and key not in overrides.get(name, {})
        ]

    def meaningful(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if any(inside(layer.name, name) for layer in self.layers()))


def base_view(bank: Bank | None) -> BaseView:
    """The view of a bank's base, or of an unknown one."""
    return BaseView() if bank is None else AttachedBase(bank)


def inside(path: str, name: str) -> bool:
    """A path is, or lies in, a module whose path ends in ``name``: the meaning of PEFT's ``modules_to_save``."""
    parts = path.split(".")
    return any(".".join(parts[: at + 1]).endswith(name) for at in range(len(parts)))


def named(model: Any) -> str | None:
    """The hub id or folder that a model says it was loaded from."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _other_vocabulary(tensor: str, found: int, expected: int) -> str:
    return (
        f"tensor {shown(tensor)} has {found:,} rows, the base's has {expected:,}: the adapter was made on a resized vocabulary; resize "
        f"the base first: model.resize_token_embeddings({found})"
    )
