"""Tiny models of many architectures, from transformers' own config classes with small sizes.

    model = build("deepseek_v3")      # a causal language model, or a multimodal one by its model type

A config takes those of the common sizes that it has fields for; ``FIELDS`` holds what an architecture needs beyond that. Weights are
random, vectors are roughened, and nothing is read from a disk or the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 320
IMAGE, VIDEO, START = VOCAB - 1, VOCAB - 2, VOCAB - 3

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "sliding_window"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_chunk_size", "state_size", "chunk_size"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_conv", "rotary_dim"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "mamba_expand", "expand"), 2
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("n_groups",), 1),
    "initializer_range": 0.15,
}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_SAME_HEADS = {"num_key_value_heads": 4}

TEXT = (
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bamba",
    "bart",
    "beam",
    "bert",
    "bert-generation",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "data2vec-text",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffllama",
    "doge",
    "dots1",
    "dots3_note_text",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "hyperclovax",
    "inkling2_text",
    "inkling_text",
    "jais2",
    "jamba",
    "jetmoe",
    "kolibri1",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4_text",
    "longcat_flash",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "megatron-bert",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "moshi",
    "mpt",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "plbart",
    "prophetnet",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "youtu",
    "zaya",
)
"""Model types of causal language models."""

FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _SAME_HEADS),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu", "dots3_note_text"), _SAME_HEADS),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _MIXED),
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm3", "lfm2_moe")},
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {**_SAME_HEADS, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
}

_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.15,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_POOLED = {"vision_use_head": False}
_QWEN: dict[str, Any] = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
_QWEN_NEW = {**_QWEN, "out_hidden_size": 32, "intermediate_size": 64}
_QWEN3 = {**_QWEN_NEW, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_BY_INDEX = {"image_token_index": IMAGE}
_BY_ID = {"image_token_id": IMAGE}
_VIDEO = {**_BY_ID, "video_token_id": VIDEO, "vision_start_token_id": START}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

# model type -> (type and fields of the text part, type and fields of the vision part, fields of the whole)
_Part = tuple[str, Mapping[str, Any]]
MULTIMODAL: dict[str, tuple[_Part, _Part, Mapping[str, Any]]] = {
    "aria": (
        ("aria_text", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
        ("idefics3_vision", {}),
        {**_BY_INDEX, "projector_patch_to_query_dict": {4: 4}},
    ),
    "aya_vision": (("cohere2", {}), ("siglip_vision_model", _POOLED), _BY_INDEX),
    "gemma3": (
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("siglip_vision_model", _POOLED),
        {**_BY_INDEX, "mm_tokens_per_image": 4},
    ),
    "glm4v": (
        ("glm4v_text", _ROPE),
        ("", {**_QWEN_NEW, "image_size": 16}),
        {**_BY_ID, "video_token_id": VIDEO, "image_start_token_id": START},
    ),
    "got_ocr2": (
        ("qwen2", {}),
        ("", {**_IMAGES, "output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [0]}),
        _BY_INDEX,
    ),
    "idefics2": (("mistral", {}), ("idefics2_vision", {}), _BY_ID),
    "idefics3": (("llama", {}), ("idefics3_vision", {}), {**_BY_ID, "scale_factor": 1}),
    "internvl": (("qwen2", {}), ("internvl_vision", {"image_size": [16, 16], "patch_size": [8, 8]}), _BY_ID),
    "lfm2_vl": (
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("siglip2_vision_model", {"num_patches": 4}),
        _BY_ID,
    ),
    "llama4": (
        ("llama4_text", {"intermediate_size_mlp": 64}),
        (
            "llama4_vision_model",
            {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        ),
        _BY_INDEX,
    ),
    "llava": (("llama", {}), ("clip_vision_model", {}), _BY_INDEX),
    "llava_next": (("llama", {}), ("clip_vision_model", {}), _BY_INDEX),
    "llava_onevision": (("qwen2", {}), ("siglip_vision_model", {}), _BY_INDEX),
    "mistral3": (("mistral", {}), ("pixtral", {"head_dim": 8}), _BY_INDEX),
    "mllama": (
        ("mllama_text_model", {"cross_attention_layers": [1]}),
        (
            "mllama_vision_model",
            {
                "num_global_layers": 1,
                "attention_heads": 4,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        ),
        _BY_INDEX,
    ),
    "paligemma": (
        ("gemma", {}),
        ("siglip_vision_model", {**_POOLED, "projection_dim": 32}),
        {**_BY_INDEX, "projection_dim": 32},
    ),
    "qwen2_5_vl": (("qwen2_5_vl_text", _ROPE), ("", {**_QWEN_NEW, "fullatt_block_indexes": [0]}), _VIDEO),
    "qwen2_vl": (("qwen2_vl_text", _ROPE), ("", {**_QWEN, "embed_dim": 32, "mlp_ratio": 2}), _VIDEO),
    "qwen3_5": (("qwen3_5_text", _MIXED), ("", {**_QWEN_NEW, "num_position_embeddings": 16}), _VIDEO),
    "qwen3_vl": (("qwen3_vl_text", _ROPE), ("", _QWEN3), _VIDEO),
    "qwen3_vl_moe": (("qwen3_vl_moe_text", {**_ROPE, **_EXPERTS}), ("", _QWEN3), _VIDEO),
    "smolvlm": (("llama", {}), ("smolvlm_vision", {}), {**_BY_ID, "scale_factor": 1}),
    "video_llava": (("llama", {}), ("clip_vision_model", {}), {**_BY_INDEX, "video_token_index": VIDEO}),
    "vipllava": (("llama", {}), ("clip_vision_model", {}), {**_BY_INDEX, "vision_feature_layers": [-1]}),
}

ARCHITECTURES = (*TEXT, *MULTIMODAL)


def build(name: str, *, seed: int = 0, **fields: Any) -> nn.Module:
    """A tiny random model of this model type in fp32, in eval mode. ``fields``: more of a text model's config."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if name in MULTIMODAL:
        config, names = _multimodal(name), auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    else:
        config, names = _config(name, _SIZES | fields, FIELDS.get(name, {})), auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, names[name])(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits of two rows of ten tokens."""
    found: Tensor = model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits
    return found


def _multimodal(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    (text, text_fields), (vision, vision_fields), fields = MULTIMODAL[name]
    seen = _config(vision, _IMAGES, vision_fields) if vision else dict(vision_fields)
    return CONFIG_MAPPING[name](text_config=_config(text, _SIZES, text_fields), vision_config=seen, **fields)


def _config(name: str, sizes: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**{**{key: sizes[key] for key in _known(name) & set(sizes)}, **fields})


@cache
def _known(name: str) -> frozenset[str]:
    """The fields of a config class."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    return frozenset(inspect.signature(cls.__init__).parameters) | frozenset(getattr(cls, "__dataclass_fields__", ()))
