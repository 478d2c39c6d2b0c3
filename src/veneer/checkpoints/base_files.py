"""A base read from its files: sites, kinds and tied weights, without a weight in memory.

The model is built on torch's meta device from config.json alone, so layer kinds (nn.Linear or the transposed Conv1D) and tied heads come
from the model and are never guessed. Weights are read from the files one by one.

Boundary: reads names and shapes; `ModelFolder` reads tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.compatibility import fit_problems
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.layers.survey import survey
from veneer.checkpoints.base_view import SkeletonView
from veneer.checkpoints.dequantized_folder import (
    DequantizedFolder,
    FolderWithHead,
    FP8Folder,
    QuantizedParameter,
    QuantizedReading,
)
from veneer.checkpoints.findings import listed
from veneer.checkpoints.model_folder import ModelFolder
from veneer.checkpoints.peft.expert_layouts import fit_experts
from veneer.errors import ComposeError, Problems
from veneer.models.classifiers.heads import belongs_to_head, class_with_head, name_padding
from veneer.models.fingerprint import quantized_fingerprint, tensor_fingerprint, weight_fingerprints
from veneer.models.load import Base, folder_of, model_class
from veneer.models.names import current_layers, plain_shapes, stored_names
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.scheme import FP8, Scheme, read_scheme, scheme_for
from veneer.models.quantized.size import stack_names

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Skeleton:
    """The files of a base, and the sites of the model that they describe."""

    folder: ModelFolder
    model: nn.Module
    survey: Survey
    names: Mapping[str, str]
    """Parameter of the model -> its name in the files."""
    task: str | None = None
    """The task of the head that the model was given, if it was."""

    @property
    def sites(self) -> dict[str, Site]:
        """The sites of the model, by name."""
        return self.survey.sites

    def owner(self, site: str) -> str:
        """The site whose weight is in the files: a tied group's first that is stored, otherwise the site itself."""
        group = self.survey.tied.get(site, (site,))
        return next((name for name in group if self._find(name) is not None), site)

    def key(self, site: str) -> str:
        """Name in the files of a site's weight. Raises ComposeError where the files name it in a way that cannot be traced."""
        found = self._find(self.owner(site))
        if found is None:
            raise ComposeError(
                f"{self.folder.path} has no tensor for {site} (looked for {site}.weight): its files hold it in another "
                "shape or under a name that cannot be traced; leave this layer out of the adapter, or load the model and save it again"
            )
        return found

    def weight_2d(self, site: str) -> Tensor:
        """A site's base weight as [out, in], in the stored dtype; read now."""
        stored = self.folder.get(self.key(site))
        return self.view_of(site, stored) if self.stacked(site) else as_2d(stored, self.sites[site].kind)

    def stacked(self, site: str) -> bool:
        """True if the files hold the weight of an expert in one tensor with others."""
        return self.sites[site].stack is not None and f"{site}.weight" not in self.names

    def view_of(self, site: str, stacked: Tensor) -> Tensor:
        """The weight of an expert [out, in] in the stacked tensor that holds it."""
        module: Any = self.sites[site].module
        weight: Tensor = module.view_of(stacked)
        return weight

    def fingerprints(self, sites: Iterable[str]) -> dict[str, str]:
        """SHA-256 of the stored weights of these sites, as `weight_fingerprints` computes them."""
        names = {site: f"{site}.weight" if site else "weight" for site in sites}
        found = {}
        for site, name in names.items():
            if self.sites[site].stack is not None:
                found[site] = tensor_fingerprint(name, self.weight_2d(site))
            elif (weight := self.folder.quantized(self.key(site))) is not None:
                found[site] = quantized_fingerprint(name, weight)
        plain = {site: name for site, name in names.items() if site not in found}
        files = Base(self.model, None, str(self.folder.path), self.folder.path, torch.float32)
        hashes = weight_fingerprints(files, plain.values())
        return found | {site: hashes[name] for site, name in plain.items()}

    def format(self, site: str) -> str | None:
        """The format of a site's weight where it is quantized, else None."""
        return self.folder.format(self.key(site))

    def parameter_key(self, name: str) -> str | None:
        """Name in the files of a parameter of the model, or of a parameter that shares its tensor; None if the files have neither."""
        if name in self.names:
            return self.names[name]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        shared = [other for other, value in parameters.items() if value is parameters.get(name)]
        return next((self.names[other] for other in shared if other in self.names), None)

    def _find(self, site: str) -> str | None:
        found = self.names.get(f"{site}.weight" if site else "weight")
        return self.names.get(self.sites[site].parameter) if found is None and site in self.sites else found


def base_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of safetensors behind a base's name (a GGUF file's dequantised copy in the cache).

    Raises BaseModelError where there is none.
    """
    return folder_of(name, revision)


def skeleton(folder: Path, quantize: str | None = None) -> Skeleton:
    """Read a model folder's names and build its model without weights.

    Weights that bitsandbytes quantized and FP8 weights are dequantized when they are read. With ``quantize`` plain ones have the values
    that they have in this format. Raises BaseModelError for weights in other formats, ComposeError where ``quantize`` contradicts them.
    """
    import transformers

    files = ModelFolder(folder)
    scheme = read_scheme(files.config, folder)
    if isinstance(scheme, FP8):
        files = FP8Folder(folder, scheme=scheme)
    elif scheme is not None:
        if quantize not in (None, scheme.format):
            raise ComposeError(
                f"the weights in {folder} are quantized to {scheme.format}, and cannot be quantized to {quantize}; leave --quantize out, "
                "or use the model that they were made from"
            )
        files, quantize = DequantizedFolder(folder), None
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        cls = model_class(folder)
        model = getattr(cls, "from_config", cls)(config)  # an auto class, or the model's own
    base = Skeleton(files, model, survey(model), stored_names(model, files.files))
    if quantize is not None:
        chosen = scheme_for(quantize)
        base.folder = QuantizedReading(files, chosen, quantized_parameters(base, chosen))
    return base


def skeleton_with_head(folder: Path, task: str, classes: Sequence[str]) -> Skeleton:
    """The skeleton of a model folder with a head for ``task``, as `load_base` would load it; its files have the names of the model.

    Args:
        folder: a folder of plain weights.
        task: "classification", "regression" or "token-classification".
        classes: the names of the classes, in the order of the outputs; none for regression.

    Raises:
        ComposeError: the weights are quantized.
        BaseModelError: transformers has no such class for this architecture.
    """
    import transformers

    files = ModelFolder(folder)
    if read_scheme(files.config, folder) is not None:
        raise ComposeError(
            f"the weights in {folder} are quantized, and a head is merged into plain weights only; give the model that they were made "
            "from with --base"
        )
    outputs = {"id2label": dict(enumerate(classes)), "label2id": {name: at for at, name in enumerate(classes)}}
    settings: dict[str, Any] = outputs if classes else {"num_labels": 1, "problem_type": "regression"}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
    with torch.device("meta"):
        cls = class_with_head(folder, task)
        model = getattr(cls, "from_config", getattr(cls, "_from_config", cls))(config)
    name_padding(model)
    names = stored_names(model, files.files)
    shapes = plain_shapes(model)
    absent = {name: shape for name, shape in shapes.items() if name not in names and belongs_to_head(model, name)}
    renamed = {key: name for name, key in names.items() if name in shapes}
    written = model.config.to_diff_dict()
    added = {key: written[key] for key in (*settings, "pad_token_id", "id2label", "label2id") if key in written}
    named = {**files.config, **added, "architectures": [type(model).__name__]}
    prefix, known = f"{model.base_model_prefix}.", set(names.values())
    prefixed = any(key.startswith(prefix) for key in files.files)
    others = frozenset(key for key in files.files if prefixed and key not in known and not key.startswith(prefix))
    view = FolderWithHead(folder, config=named, renamed=renamed, absent=absent, dropped=others)
    found = {name: renamed.get(key, key) for name, key in names.items()}
    return Skeleton(view, model, survey(model), {**found, **{name: name for name in absent}}, task)


def quantized_parameters(base: Skeleton, scheme: Scheme) -> dict[str, QuantizedParameter]:
    """The tensors of the files that are quantized while they are read, with the parameters that they are parts of."""
    found: dict[str, QuantizedParameter] = {}
    shapes = plain_shapes(base.model)
    linear = [f"{name}.weight" for name in quantized_names(base.model, scheme.skip)]
    stacks: dict[str, dict[str, Any]] = {name: {} for name in stack_names(base.model)}
    for name, site in base.sites.items():
        if site.parameter in stacks and (key := base.names.get(f"{name}.weight")) is not None:
            stacks[site.parameter][key] = getattr(site.module, "view_of")  # noqa: B009
    for name in (*linear, *stacks):
        shape, key = shapes[name], base.names.get(name)
        transposed = name in linear and base.sites[name.removesuffix(".weight")].kind == "conv1d"
        places: dict[str, Any] = stacks.get(name, {}) if key is None else {key: _same}
        found |= dict.fromkeys(places, QuantizedParameter(name, shape, transposed, places))
    return found


def _same(parameter: Tensor) -> Tensor:
    return parameter


def as_2d(weight: Tensor, kind: str) -> Tensor:
    """A stored weight seen as [out, in]; a view. A vector (a bias, a norm's weight) is [out, 1]."""
    if kind in ("conv1d", "embedding"):
        return weight.T
    if kind == "vector":
        return weight.unsqueeze(1)
    return weight.flatten(1) if kind == "conv2d" else weight


def as_stored(weight_2d: Tensor, kind: str, shape: Iterable[int]) -> Tensor:
    """The inverse of `as_2d`."""
    if kind in ("conv1d", "embedding"):
        return weight_2d.T
    return weight_2d.reshape(tuple(shape)) if kind in ("conv2d", "vector") else weight_2d


def fit(adapter: Adapter, base: Skeleton) -> Adapter:
    """The adapter, with the name and kind of each site taken from the base: a file may have an earlier name, and files without a receipt
    leave the kind open.

    Raises ComposeError that lists every site which the base lacks or which has another shape.
    """
    if base.survey.stacks:
        fit_experts(adapter, SkeletonView(base.model, base.survey))
    unknown = [name for name in (*adapter.tensors, *adapter.overrides) if base.survey.find(name) is None]
    if unknown:
        renamed, nested = current_layers(base.model, unknown)
        names = {**nested, **renamed}
        adapter.rename_layers(names)
        adapter.meta["names"] = {new: old for old, new in names.items()}
    adapter.kinds = adapter.kinds | {name: base.sites[name].kind for name in adapter.tensors if name in base.sites}
    problems = Problems()
    for problem in fit_problems(adapter, base.survey):
        problems.add(problem)
    problems.raise_if_any(ComposeError, f'the adapter "{adapter.name}" does not fit the base in {base.folder.path}')
    return adapter


def check_finite(adapter: Adapter) -> None:
    """Raise ComposeError that names every tensor which holds NaN or infinity."""
    problems = Problems()
    for name, key, tensor in adapter.named_tensors():
        if not bool(torch.isfinite(tensor).all()):
            problems.add(f"{name}.{key} holds values that are not finite")
    problems.raise_if_any(ComposeError, f'the adapter "{adapter.name}" cannot be used')


def check_changes_only(adapter: Adapter) -> None:
    """Raise ComposeError for an adapter with overrides, which are not low-rank changes."""
    if adapter.overrides:
        raise ComposeError(
            f'the adapter "{adapter.name}" overrides parameters of the base at {listed(adapter.overrides)}, which cannot be composed; '
            "merge it with veneer merge"
        )


def check_float(key: str, weight: Tensor) -> None:
    """Raise ComposeError for a weight that is not stored as plain floating-point numbers."""
    if weight.dtype not in _FLOATS:
        raise ComposeError(
            f"{key} is stored as {weight.dtype}, and a change can only be added to floating-point weights"
        )
