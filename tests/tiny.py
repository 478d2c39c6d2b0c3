"""Tiny random models and a tiny tokenizer for tests, built in memory in milliseconds.

    model = tiny("llama")                              # hidden size 32, 2 layers, vocabulary 320
    model = tiny("gemma3", tie_word_embeddings=False)  # any field of the architecture's config can be overridden
    tokenizer = tiny_tokenizer()                       # byte-level BPE over the same 320 tokens, with ChatML

Default initialisation hides mistakes: biases are zero, norms are one and attention is uniform. So weights are drawn
from a wider distribution, every vector (bias or norm) gets noise, sliding windows are shorter than usual test sequences, and
soft caps are low enough to matter. Dropout is off unless requested. Nothing is read from a disk or the network, and the
global random state does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

__all__ = ["ARCHS", "CHATML", "VOCAB", "tiny", "tiny_tokenizer"]

VOCAB = 320  # 256 bytes, three control tokens and 61 merges
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
_GROUPED = {**_SIZES, **_IDS, "num_key_value_heads": 2}
_BERT: dict[str, Any] = {
    **_SIZES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_GPT = {**_IDS, "initializer_range": 0.15}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 8}

# name -> (config class, model class, fields of the config)
_TABLE: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**_GROUPED, **_WINDOW, "head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, **_WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_GROUPED,
            **_WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_GROUPED,
            **_WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            **_GROUPED,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GROUPED, **_WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_GROUPED,
            "intermediate_size_mlp": 64,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 8,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            **_GPT,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SIZES, **_IDS, "rotary_pct": 0.5}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "dropout": 0.0,
            "init_std": 0.15,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {**_GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**_SIZES, **_IDS, "ffn_hidden_size": 64}),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {**_IDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "initializer_range": 0.15},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **_SIZES,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "cls_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
        },
    ),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            **{name: value for name, value in _BERT.items() if name not in ("max_position_embeddings", "pad_token_id")},
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
    ),
    "llama_classifier": ("LlamaConfig", "LlamaForSequenceClassification", {**_GROUPED, "num_labels": 3}),
    "bert_classifier": ("BertConfig", "BertForSequenceClassification", {**_BERT, "num_labels": 3}),
}

ARCHS: tuple[str, ...] = tuple(_TABLE)

# A typical chat template: a default system message, then every message between control tokens.
CHATML = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou answer in one line.<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_SENTENCES = (
    "The rain had stopped before the train reached the station at the end of the line.",
    "An adapter learns the difference; the base stays the same for everyone who uses it.",
    "def area(width, height): return width * height  # the answer is a number",
    "user asks, assistant answers, system sets the tone.",
    "One hundred and twenty-three other words would do as well here, there and then.",
)


def tiny(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Build a random model in eval mode with trainable parameters.

    Args:
        arch: one of ``ARCHS``.
        seed: seed of the weights.
        dtype: data type of the weights.
        overrides: fields of the architecture's config, for example ``num_hidden_layers=3``.

    Raises:
        ValueError: ``arch`` is unknown.
    """
    import transformers

    if arch not in _TABLE:
        raise ValueError(f"there is no tiny model {arch!r}; choose one of {', '.join(ARCHS)}")
    config_class, model_class, fields = _TABLE[arch]
    sized = {} if arch == "vit" else {"vocab_size": VOCAB}
    config = getattr(transformers, config_class)(**{**sized, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        _add_noise_to_vectors(model)
    return model.to(dtype).eval()


@torch.no_grad()
def _add_noise_to_vectors(model: torch.nn.Module) -> None:
    """Make every bias nonzero and every norm weight different from one."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def tiny_tokenizer() -> Any:
    """Build a fast byte-level BPE tokenizer of ``VOCAB`` tokens with ChatML control tokens.

    ``<|endoftext|>`` is 0 (unknown), ``<|im_start|>`` 1 (begin) and ``<|im_end|>`` 2 (end, padding). No token is added to
    a text.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=256,
    )


@lru_cache(maxsize=1)
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return str(tokenizer.to_str())
