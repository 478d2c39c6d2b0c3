"""Tiny models: every architecture builds, computes, and is sensitive to what tests want to see."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import ARCHS, VOCAB, tiny, tiny_tokenizer


def _inputs(arch: str) -> dict[str, torch.Tensor]:
    if arch == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids} if arch == "t5" else {"input_ids": ids}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_builds_and_computes_finite_distinct_logits(arch: str) -> None:
    """A tiny model is small, in eval mode, trainable, repeatable, and gives different inputs different outputs."""
    model = tiny(arch)
    assert sum(p.numel() for p in model.parameters()) < 90_000
    assert not model.training and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        logits = model(**_inputs(arch)).logits
        assert torch.equal(logits, tiny(arch)(**_inputs(arch)).logits)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_seed_decides_the_weights_and_the_global_random_state_is_left_alone() -> None:
    """Two seeds give two models, and building one draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    first, second = tiny("llama", seed=0), tiny("llama", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_biases_and_norms_are_not_at_their_neutral_values() -> None:
    """No bias is zero and no norm is one, so that forgetting either changes the output."""
    for name, parameter in tiny("gpt2").named_parameters():
        if parameter.dim() == 1:
            assert not torch.any(parameter == 0) and not torch.any(parameter == 1), name


def test_overrides_reach_the_config_and_tying_can_be_chosen() -> None:
    """Fields of the config can be set, tied and untied heads included."""
    tied = tiny("llama", tie_word_embeddings=True, num_hidden_layers=3)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and len(tied.model.layers) == 3
    untied = tiny("gpt2", tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_unknown_architecture_is_an_error_that_lists_what_there_is() -> None:
    """The error names the choices."""
    with pytest.raises(ValueError, match="llama"):
        tiny("lama")


def test_tokenizer_round_trips_any_text_and_fits_the_models() -> None:
    """Every byte sequence of valid text survives, and no id lies outside the tiny models' vocabulary."""
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCAB
    for text in ("The base stays.", "  tabs\tand\nlines ", "naïve café – 漢字 🙂", "def f(x): return x"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and max(ids) < VOCAB
    assert len(tokenizer("The rain had stopped")["input_ids"]) < len("The rain had stopped")


def test_chat_template_renders_chatml_with_single_control_tokens() -> None:
    """Control tokens are one id each, and a default system message comes first when there is none."""
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\nho<|im_end|>\n")
    ids = tokenizer(text)["input_ids"]
    assert ids.count(1) == 3 and ids.count(2) == 3
