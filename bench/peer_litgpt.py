"""LitGPT's side of bench/interop.py, run by an interpreter with litgpt: BASE OUT ARCH KIND."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.lora import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox, copy_weights_hf_llama, copy_weights_phi
from safetensors.torch import load_file, save_file

WHICH = {
    "qv": ("query", "value"),
    "qk": ("query", "key"),
    "all": ("query", "key", "value", "projection", "mlp", "head"),
}


def main(base: Path, out: Path, arch: str, kind: str) -> None:
    """Add an adapter with random values to the base; save it and its logits."""
    torch.manual_seed(1)
    lora: dict[str, Any] = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.05}
    lora |= {f"lora_{part}": part in WHICH[kind] for part in WHICH["all"]}
    if arch in ("real", "gpt_neox"):
        lora["lora_head"] = False  # LitGPT unties it from the embedding; GPT-NeoX files name it differently
    given = json.loads((base / "config.json").read_text())
    model = GPT(Config(**settings(given, arch), **lora)).eval()
    model.load_state_dict(weights(base, model.config, arch), strict=False)
    ids = torch.tensor([list(range(270, 307))])
    factors = {name: value for name, value in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        logits = {"base": model(ids)}
        for value in factors.values():
            value.add_(0.05 * torch.randn(value.shape))
        logits["adapted"] = model(ids)
    vocabulary = given["vocab_size"]
    out.mkdir(parents=True)
    torch.save(
        {"model": {name: value for name, value in model.state_dict().items() if "lora_" in name}},
        out / "lit_model.pth.lora",
    )
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in lora.items()]
    (out / "hyperparameters.yaml").write_text(
        f"checkpoint_dir: checkpoints/somebody/base\nprecision: 32-true\n{''.join(lines)}"
    )
    save_file(
        {name: value[..., :vocabulary].contiguous() for name, value in logits.items()}, f"{out}.logits.safetensors"
    )


def settings(given: dict[str, Any], arch: str) -> dict[str, Any]:
    """LitGPT's settings for a base's config.json."""
    neox = arch == "gpt_neox"
    rope = given.get("rope_parameters") or {}
    found = {
        "block_size": given["max_position_embeddings"],
        "vocab_size": given["vocab_size"],
        "padded_vocab_size": given["vocab_size"] if arch == "real" else given["vocab_size"] + 64,
        "n_layer": given["num_hidden_layers"],
        "n_head": given["num_attention_heads"],
        "n_embd": given["hidden_size"],
        "n_query_groups": given.get("num_key_value_heads") or given["num_attention_heads"],
        "intermediate_size": given["intermediate_size"],
        "rotary_percentage": rope.get("partial_rotary_factor", 1.0) or 1.0,
        "rope_base": int(rope.get("rope_theta", 10000)),
        "parallel_residual": neox,
        "bias": neox,
        "norm_eps": given.get("rms_norm_eps") or given.get("layer_norm_eps"),
        "norm_class_name": "LayerNorm" if neox else "RMSNorm",
        "mlp_class_name": "GptNeoxMLP" if neox else "LLaMAMLP",
    }
    return found


def weights(base: Path, config: Config, arch: str) -> dict[str, torch.Tensor]:
    """The base's weights under LitGPT's names, by its own converter, with a padded vocabulary."""
    given = {name: value.float() for file in base.glob("*.safetensors") for name, value in load_file(file).items()}
    made: dict[str, torch.Tensor] = {}
    if arch == "gpt_neox":
        copy_weights_gpt_neox(config, made, given)
    elif arch == "phi3":
        config.name = "Phi-3"
        copy_weights_phi(config, {}, made, given)
    else:
        copy_weights_hf_llama(config, {}, made, given)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        more = config.padded_vocab_size - made[name].shape[0]
        made[name] = torch.cat([made[name], torch.zeros(more, made[name].shape[1])])
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
