"""Checks an adapter on a model: its logits on a fixed input against those of the base, of a merge, and of its receipt.

    adapted against base      the adapter acts at all
    adapted against merged    what the layers compute is W' x (the merged weights stand in the model for one call, by reference)
    adapted against receipt   eight numbers of the logits, recorded when the adapter was saved; comparable within one dtype

The input is made of the model's own vocabulary, so no tokenizer is needed: two rows of sixteen tokens, or two images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.bank import Bank
from veneer.adapters.layers.dry_run import example_inputs
from veneer.checkpoints.receipt import eight, receipt_of
from veneer.checkpoints.tensors import dtype_name
from veneer.errors import CheckpointError
from veneer.models.flat_check import eval_mode

ROWS, TOKENS = 2, 16
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def fixed_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one forward, the same for every model of one vocabulary.

    Raises CheckpointError for a model whose inputs cannot be guessed.
    """
    inputs = example_inputs(model)
    if inputs is None:
        raise CheckpointError(f"{type(model).__name__}: its inputs cannot be guessed, so its logits cannot be compared")
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        spread = torch.arange(1, ROWS * TOKENS + 1, device=ids.device) * 7919 % max(1, vocabulary - 1) + 1
        spread = spread.reshape(ROWS, TOKENS).clamp_max(vocabulary - 1)
        inputs = dict.fromkeys(inputs, spread)
    return inputs


@torch.no_grad()
def logits_of(bank: Bank, route: str | None) -> Tensor:
    """Logits of the attached model on `fixed_inputs` under a route, in eval mode."""
    model = bank.model
    with eval_mode(model), bank.use(route):
        out = model(**fixed_inputs(model))
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise CheckpointError(f"{type(model).__name__} returns no logits, so none can be compared")
    return logits


def logits_record(bank: Bank, name: str) -> dict[str, Any]:
    """{"dtype", "numbers"}: eight numbers of an adapter's logits, for its receipt."""
    logits = logits_of(bank, name)
    return {"dtype": _dtype(bank), "numbers": eight(logits.detach().float().cpu().reshape(-1), "logits")}


def verify_logits(bank: Bank, name: str) -> dict[str, Any]:
    """Compare an adapter's logits with the base's, a merge's and its receipt's.

    Returns {"dtype", "moved", "merged", "recorded", "ok", "says"}: the largest differences, None where there is nothing to compare.
    """
    adapted, base = logits_of(bank, name), logits_of(bank, None)
    merged = _merged_logits(bank, name)
    size = float(adapted.float().abs().max())
    limit = _TOLERANCE.get(adapted.dtype, 5e-2)
    problems: list[str] = []
    moved, off = float((adapted - base).abs().max()), float((adapted - merged).abs().max())
    if not bool(torch.isfinite(adapted).all()):
        problems.append("the adapter's logits are not finite")
    if moved == 0:
        problems.append("the adapter changes no logit")
    if not off <= limit * max(1.0, size):
        problems.append(f"the adapter's logits differ from those of the merged weights by up to {off:.3g}")
    recorded = _recorded(bank, name, adapted, limit, problems)
    return {
        "dtype": _dtype(bank),
        "moved": moved,
        "merged": off,
        "recorded": recorded,
        "ok": not problems,
        "says": problems,
    }


def _recorded(bank: Bank, name: str, adapted: Tensor, limit: float, problems: list[str]) -> float | None:
    record = receipt_of(bank[name]).get("logits") or {}
    numbers = record.get("numbers") if isinstance(record, dict) else None
    if not isinstance(numbers, list) or len(numbers) != 8 or record.get("dtype") != _dtype(bank):
        return None  # none were recorded, or in another dtype, in which they may differ
    then = torch.tensor(numbers, dtype=torch.float64)
    now = torch.tensor(eight(adapted.detach().float().cpu().reshape(-1), "logits"), dtype=torch.float64)
    apart = float((now - then).norm() / then.norm().clamp_min(1e-12))
    if not apart <= limit:
        problems.append(f"the adapter's logits differ from those recorded in its receipt by {apart:.2%}")
    return apart


@torch.no_grad()
def _merged_logits(bank: Bank, name: str) -> Tensor:
    """Logits with the merged weights in the layers' places; the base's own tensors are put back, never computed back."""
    state = bank.merged_state_dict(name)
    parameters = dict(bank.model.named_parameters(remove_duplicate=False))
    changed = {key: value for key, value in state.items() if key in parameters and value is not parameters[key].data}
    kept = {key: parameters[key].data for key in changed if changed[key].data_ptr() != parameters[key].data_ptr()}
    try:
        for key in kept:
            _set(bank.model, key, nn.Parameter(changed[key], requires_grad=False))
        return logits_of(bank, None)
    finally:
        for key in kept:
            _set(bank.model, key, parameters[key])


def _set(model: nn.Module, key: str, value: nn.Parameter) -> None:
    path, _, name = key.rpartition(".")
    model.get_submodule(path)._parameters[name] = value


def _dtype(bank: Bank) -> str:
    return dtype_name(next(bank.model.parameters()).dtype)
