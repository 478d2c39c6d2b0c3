"""A base read from its files: sites, kinds and tied weights, without a weight in memory.

The model is built on torch's meta device from config.json alone, so the kind of a layer (is this square matrix an nn.Linear or a
transposed Conv1D? is the head tied?) comes from the model itself and is never guessed. Weights are read from the files one by one, under
the names that they have there.

Boundary: reads names and shapes; `ModelFolder` reads tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.adapter import Adapter
from veneer.adapters.layers.site import Site, Survey
from veneer.adapters.layers.survey import survey
from veneer.adapters.overrides import problems_of
from veneer.checkpoints.model_folder import ModelFolder
from veneer.errors import ComposeError, Problems
from veneer.models.load import load_base
from veneer.models.names import stored_names
from veneer.models.sources import resolve

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Skeleton:
    """A base's files beside the sites of the model that they make."""

    folder: ModelFolder
    model: nn.Module
    survey: Survey
    names: Mapping[str, str]
    """Parameter of the model -> its name in the files."""

    @property
    def sites(self) -> dict[str, Site]:
        """Every place that an adapter could act on."""
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
        return as_2d(self.folder.get(self.key(site)), self.sites[site].kind)

    def parameter_key(self, name: str) -> str | None:
        """Name in the files of any parameter of the model: its own, or that of a parameter which it is shared with."""
        if name in self.names:
            return self.names[name]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        shared = [other for other, value in parameters.items() if value is parameters.get(name)]
        return next((self.names[other] for other in shared if other in self.names), None)

    def _find(self, site: str) -> str | None:
        return self.names.get(f"{site}.weight" if site else "weight")


def base_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of safetensors behind a base's name (a GGUF file's dequantised copy in the cache).

    Raises BaseModelError where there is none.
    """
    source = resolve(str(name), revision)
    if not source.gguf:
        return source.path
    path = load_base(name, revision=revision).path
    assert path is not None
    return path


def skeleton(folder: Path) -> Skeleton:
    """Read a model folder's names and build its model without weights.

    Raises ComposeError for weights that are quantized: a delta cannot be added to them.
    """
    import transformers

    files = ModelFolder(folder)
    if files.config.get("quantization_config"):
        raise ComposeError(
            f"the weights in {folder} are quantized, and a change cannot be added to them; use the base they were made from"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = _model_class(files.config, config)(config)
    return Skeleton(files, model, survey(model), stored_names(model, files.files))


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
    """The adapter, with each site's kind taken from the base.

    Raises ComposeError that lists every site which the base lacks or which has another shape, and values that are not finite.
    """
    problems = Problems()
    for name, own in adapter.tensors.items():
        site = base.sites.get(name)
        if site is None:
            problems.add(f"{name}: the base has no such layer")
            continue
        _check_shapes(adapter, site, own, problems)
    for name in adapter.overrides:
        for problem in problems_of(adapter, name, base.sites.get(name) or base.survey.vector_layers.get(name)):
            problems.add(problem)
    problems.raise_if_any(ComposeError, f'the adapter "{adapter.name}" does not fit the base in {base.folder.path}')
    adapter.kinds = {name: base.sites[name].kind for name in adapter.tensors}
    return adapter


def check_finite(adapter: Adapter) -> None:
    """Raise ComposeError that names every tensor which holds NaN or infinity."""
    problems = Problems()
    for name, key, tensor in adapter.named_tensors():
        if not bool(torch.isfinite(tensor).all()):
            problems.add(f"{name}.{key} holds values that are not finite")
    problems.raise_if_any(ComposeError, f'the adapter "{adapter.name}" cannot be used')


def check_changes_only(adapter: Adapter) -> None:
    """Raise ComposeError where an adapter has weights, biases or rows of its own, which are no low-rank changes."""
    for name, own in adapter.overrides.items():
        more = f" and at {len(adapter.overrides) - 1} other places" if len(adapter.overrides) > 1 else ""
        raise ComposeError(
            f'the adapter "{adapter.name}" has its own {" and ".join(own)} at {name}{more}, which cannot be composed; '
            "veneer merge takes such adapters"
        )


def _check_shapes(adapter: Adapter, site: Site, tensors: Mapping[str, Tensor], problems: Problems) -> None:
    expected = adapter.method.tensor_shapes(site.geometry, adapter.rank(site.name))
    for key in sorted({*tensors, *expected}):
        if key not in tensors:
            problems.add(f"{site.name}: {key} is missing, and the base has a layer of kind {site.kind} here")
        elif key not in expected:
            problems.add(f"{site.name}: {key} does not belong to a layer of kind {site.kind}")
        elif tuple(tensors[key].shape) != expected[key]:
            problems.add(f"{site.name}.{key}: expected shape {expected[key]}, found {tuple(tensors[key].shape)}")


def check_float(key: str, weight: Tensor) -> None:
    """Raise ComposeError for a weight that is not stored as plain floating-point numbers."""
    if weight.dtype not in _FLOATS:
        raise ComposeError(
            f"{key} is stored as {weight.dtype}, and a change can only be added to floating-point weights"
        )


def _model_class(stored: Mapping[str, Any], config: Any) -> Any:
    """The class that config.json names, as `load_base` chooses it."""
    import transformers

    for name in stored.get("architectures") or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_config
