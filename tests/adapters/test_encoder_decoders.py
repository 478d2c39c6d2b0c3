"""Models with an encoder and a decoder: each row has its own adapter, in forward and in generation, and PEFT reads the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.checkpoints.helpers import stir
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import veneer
from veneer import DoRA, LoRA

SIZES: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WORDS = torch.tensor([[1, 5, 6], [1, 7, 8]])
TEXT = {"input_ids": torch.tensor([[9, 10, 11, 2], [12, 13, 14, 2]])}
SOUND = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))}


def whisper() -> nn.Module:
    more = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**SIZES, **IDS, **more))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], tuple[str, ...]]] = {
    "whisper": (whisper, SOUND, ("q_proj", "v_proj")),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**SIZES, **IDS)), TEXT, ("k_proj", "fc1", "fc2")),
    "marian": (lambda: MarianMTModel(MarianConfig(**SIZES, **IDS, forced_eos_token_id=2)), TEXT, ("out_proj", "fc2")),
    "t5": (t5, TEXT, ("q", "v", "wo")),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, decoder_input_ids=WORDS).logits
    return found


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("name", MODELS)
def test_rows_have_their_own_adapters(name: str, method: Any, tmp_path: Path) -> None:
    """The first row is as under the adapter alone, the second as the base; beam search keeps rows apart; PEFT computes the same."""
    model, inputs, targets = made(name), *MODELS[name][1:]
    bank = veneer.attach(model, example={**inputs, "decoder_input_ids": WORDS})
    adapter = bank.add("a", method(r=2, target_modules=targets))
    stir(nn.ParameterDict({str(i): parameter for i, parameter in enumerate(adapter.parameters())}), "")
    plain = logits(model, inputs)
    with bank.use("a"):
        full = logits(model, inputs)
    with bank.use(["a", None]):
        rows = logits(model, inputs)
    assert not torch.allclose(full, plain, atol=1e-4)
    torch.testing.assert_close(rows[0], full[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[1], plain[1], rtol=0, atol=1e-6)
    with bank.use(["a", None], repeat=2), torch.no_grad():
        assert len(model.generate(**inputs, max_new_tokens=3, num_beams=2)) == 2
    bank.save("a", tmp_path)
    theirs = PeftModel.from_pretrained(made(name), str(tmp_path)).base_model.model
    torch.testing.assert_close(logits(theirs, inputs), full, rtol=0, atol=1e-5)
