"""Bases with a head in place of the language model's: for classes and numbers of a text, or of each word.

The class is transformers' own: ``BertForSequenceClassification``, ``LlamaForTokenClassification``. The head in the base is drawn with a
fixed seed where the files have none; adapters bring their own (``adapters/overrides.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.errors import BaseModelError
from veneer.models.sources import read_config

HEADS = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "token-classification": "TokenClassification",
}
"""The kind of head of each task that has one; tasks of language models have none."""
_SPREAD = 0.02


def class_with_head(folder: Path, task: str) -> Any:
    """The class for a task: the one that config.json names, if it has this head, else transformers' class of the architecture.

    Raises BaseModelError where transformers has none.
    """
    import transformers

    kind = HEADS[task]
    for name in read_config(folder).get("architectures") or ():
        named = getattr(transformers, str(name), None)
        if str(name).endswith(f"For{kind}") and isinstance(named, type):
            return named
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    if type(config) not in auto._model_mapping:
        raise BaseModelError(
            f"transformers has no {config.model_type} model with a head for {task}; use another base, such as a BERT, RoBERTa, Llama or "
            "Qwen model"
        )
    return auto


def belongs_to_head(model: torch.nn.Module, key: str) -> bool:
    """True if a parameter stands behind the model's body, or in the pooler of it."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    return not key.startswith(body) or "pooler" in key.split(".")


@torch.no_grad()
def draw_head(model: torch.nn.Module, missing: Iterable[str]) -> None:
    """Draw the matrices that the files do not have, N(0, 0.02^2), in the same way in every process; vectors keep their initial values."""
    parameters = {key: model.get_parameter(key) for key in missing}
    for key, drawn in drawn_head({key: value.shape for key, value in parameters.items() if value.dim() > 1}).items():
        parameters[key].copy_(drawn)


def drawn_head(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """The values that `draw_head` gives to matrices of these names and shapes."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.empty(*shapes[key]).normal_(0, _SPREAD, generator=generator) for key in sorted(shapes)}


def name_padding(model: Any) -> None:
    """Give the config a padding token, without which transformers refuses batches of several texts."""
    if getattr(model.config, "pad_token_id", None) is None:
        end = getattr(model.config, "eos_token_id", None)
        model.config.pad_token_id = end if isinstance(end, int) else 0


def check_trainable(name: str, model: Any, task: str) -> None:
    """Raise BaseModelError for a base that a run of the task cannot train."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise BaseModelError(
            f"{name}: {kind} is an encoder-decoder model, and runs train models of one input; attach adapters to it in Python "
            "(veneer.attach) and train them in your own loop"
        )
    is_body = (
        getattr(model, "base_model", None) is model
    )  # transformers' property: a model with a head returns the body in it
    if task not in HEADS and is_body and model.get_output_embeddings() is None:
        raise BaseModelError(
            f"{name}: task {task} needs a language model, and {kind} predicts no tokens; choose another base, or train a head with "
            f"task {', '.join(HEADS)}"
        )
