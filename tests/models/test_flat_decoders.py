"""Flat runs of models whose decoder is itself a language model with a head, and of models that need more than token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tests.checkpoints.architectures import build

from veneer.errors import BaseModelError
from veneer.models.flat import Flat, FlatRunner

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
LLAMA4 = {**TEXT, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _llama4_of_images() -> Any:
    sizes = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}
    config = transformers.Llama4Config(
        text_config={**LLAMA4, "attention_chunk_size": 64}, vision_config={**VISION, **sizes}
    )
    return transformers.Llama4ForConditionalGeneration(config)


def _llama4(chunk: int) -> Any:
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4, attention_chunk_size=chunk))


def _qwen2_audio() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8}
    config = transformers.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"}, audio_config={**sizes, "max_source_positions": 16}
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def _granite_speech() -> Any:
    encoder = {"input_dim": 16, "num_layers": 1, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "output_dim": 16}
    projector = {"model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.GraniteSpeechConfig(
        text_config={**TEXT, "model_type": "granite"},
        encoder_config={**encoder, "context_size": 8, "max_pos_emb": 8},
        projector_config={**projector, "intermediate_size": 64, "encoder_hidden_size": 32},
        has_lora_adapter=False,
    )
    return transformers.GraniteSpeechForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama4": (lambda: _llama4(64), "padded", "Llama4TextModel"),
    "llama4 with segments longer than a chunk": (lambda: _llama4(8), "padded", "Llama4TextModel"),
    "llama4 with images": (_llama4_of_images, "padded", "Llama4TextModel"),
    "qwen2 audio": (_qwen2_audio, "flat", "Qwen2Model"),
    "granite speech": (_granite_speech, "flat", "GraniteModel"),
}


def _built(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_body_is_found_below_every_head(name: str) -> None:
    """The body is the part without a head, each segment is as alone, and the head is one product of the body's states."""
    make, kind, body = MODELS[name]
    model = _built(make)
    runner = FlatRunner(model)
    assert runner.kind == kind and type(runner._body).__name__ == body
    segments = [list(range(3, 30)), list(range(40, 52))]
    flat = Flat.of(segments)
    logits = runner.logits(flat)
    alone = [model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0] for ids in segments]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    head = runner.head()
    assert head is not None
    torch.testing.assert_close(runner.hidden(flat) @ head[0].T, logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_needs_images_is_refused_with_the_reason() -> None:
    """The message names the missing input and does not blame the batch."""
    text = {"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    config = transformers.Blip2Config(
        text_config={**text, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64},
        vision_config=VISION,
        qformer_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
        num_query_tokens=2,
    )
    model = _built(lambda: transformers.Blip2ForConditionalGeneration(config))
    with pytest.raises(BaseModelError, match=r"cannot be run on one text by its token ids alone .*pixel_values"):
        FlatRunner(model)


def test_a_prefix_language_model_is_refused_for_its_attention() -> None:
    """PaliGemma sees the whole text where there is one, and the tokens before in a batch: refused, and not trained on another function."""
    with pytest.raises(
        BaseModelError,
        match=r"gives other results in a batch than for each text alone \(its attention computes with the mask itself; .*use another base",
    ):
        FlatRunner(build("paligemma"))
