"""Comparison of a merged model's logits with the adapted model's on a probe text in fp32, one model after the other.

In fp32 the only difference between them is the rounding of the stored weights; a merge stored in fp32 agrees to about 1e-6 of the logits.
The comparison also gives the size of the adapters' own change of the logits, as the scale for that difference.

One model at a time is in memory; `fits_in_memory` checks beforehand.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.checkpoints.base_files import Skeleton
from veneer.checkpoints.dequantized_folder import FolderWithHead, QuantizedReading
from veneer.checkpoints.model_folder import ModelFolder
from veneer.deltas.parents import copy_as
from veneer.errors import ComposeError
from veneer.merge.plan import Mix
from veneer.models.devices import device_of
from veneer.models.load import Base, load_base

PROBE_TEXT = (
    "The harbour master wrote the tide table by hand: high water at 6:42, low water at 12:57, and a note that the ferry of "
    "Thursday leaves an hour early. Question: how long is it from high to low water? Answer: 6 hours and 15 minutes."
)
WRONG = 1e-3
"""Difference relative to the largest logit above which a merge stored in fp32 is wrong and not just rounded."""


@dataclass(frozen=True)
class LogitComparison:
    """Largest differences of logits over all positions of the probe text, in fp32.

    merged: merged against adapted. change: adapted against the base. scale: the largest adapted logit. same_top: share of positions
    with the same most likely token. with_residual: merged plus residual adapter against adapted.
    """

    merged: float
    change: float
    scale: float
    same_top: float
    positions: int
    unit: str = "token"
    with_residual: float | None = None


def fits_in_memory(weight_bytes: int) -> bool:
    """A model of this size (bytes in fp32) fits in the free memory; True if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return True
    return weight_bytes * 1.3 < free


def compare_logits(
    base: Skeleton | Path,
    merged: Path,
    mix: Mix,
    *,
    text: str = PROBE_TEXT,
    residual: Adapter | None = None,
    device: str | torch.device = "cpu",
) -> LogitComparison | None:
    """Compare the logits of the base, the base with ``mix`` and the merged model on a text, in fp32.

    Returns:
        None for a model that does not run on token ids alone.

    Raises:
        ComposeError: a merged model stored in fp32 computes something else than the adapted one.
    """
    loaded, head = _load(base, device), None if isinstance(base, Path) else base.task
    config: Any = loaded.model.config
    if config.is_encoder_decoder or "input_ids" not in inspect.signature(loaded.model.forward).parameters:
        return None
    ids = _ids(loaded.tokenizer, loaded.model, text)
    plain = _logits(loaded.model, ids)
    adapted = _adapted(loaded.model, ids, mix)
    del loaded
    again = load_base(merged, dtype="float32", device=device)
    found = _logits(again.model, ids)
    with_residual = None
    if residual is not None:
        with_residual = float((_adapted(again.model, ids, [(residual, 1.0)]) - adapted).abs().max())
    difference, scale = float((found - adapted).abs().max()), float(adapted.abs().max())
    comparison = LogitComparison(
        merged=difference,
        change=float((adapted - plain).abs().max()) if plain.shape == adapted.shape else scale,
        scale=scale,
        same_top=float((found.argmax(-1) == adapted.argmax(-1)).float().mean()),
        positions=adapted[..., 0].numel(),
        unit="token" if adapted.dim() == 3 and head is None else "class",
        with_residual=with_residual,
    )
    files = ModelFolder(merged)
    exact = files.dtypes() <= {"F64", "F32"} and "quantization_config" not in files.config
    if exact and not difference <= WRONG * scale:
        raise ComposeError(
            f"the merged model in fp32 does not compute what the adapted one does (logits differ by {difference:.3g} of {scale:.3g}); "
            "nothing was written, because this model uses a merged weight in a way that is not supported"
        )
    return comparison


def _load(base: Skeleton | Path, device: str | torch.device) -> Base:
    """The base in fp32, with the values that its quantized weights have."""
    if isinstance(base, Path):
        return load_base(base, dtype="float32", device=device)
    loaded = load_base(base.folder.path, dtype="float32", device=device, task=base.task)
    if isinstance(base.folder, FolderWithHead):
        for name in base.folder.absent:  # as wide as the adapters' heads
            layer, _, key = name.rpartition(".")
            setattr(
                loaded.model.get_submodule(layer), key, Parameter(base.folder.get(name).to(device), requires_grad=False)
            )
    if isinstance(base.folder, QuantizedReading):
        for held in {id(held): held for held in base.folder.parameters.values()}.values():
            loaded.model.get_parameter(held.name).data.copy_(base.folder.dense(held))
    return loaded


def _ids(tokenizer: Any, model: Any, text: str) -> Tensor:
    if tokenizer is not None:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if int(ids.max()) < model.get_input_embeddings().weight.shape[0]:
            return ids
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, vocabulary, (1, 48), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(input_ids=ids.to(device_of(model)))[0]
    return output.float().cpu()


def _adapted(model: Any, ids: Tensor, mix: Mix) -> Tensor:
    """Logits under a weighted mix; the model is left unchanged."""
    bank = attach(model)
    try:
        route = {}
        for number, (adapter, weight) in enumerate(mix):
            # Two parents may carry one name, and an adapter may stand in a mix twice.
            name = f"parent-{number}"
            bank.insert(copy_as(adapter, name))
            route[name] = weight
        with bank.use(route, training=False):
            return _logits(model, ids)
    finally:
        bank.detach()
