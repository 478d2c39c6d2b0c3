"""mlx-lm's side of bench/interop.py, run by an interpreter with mlx-lm: BASE OUT ARCH KIND."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config


def main(base: Path, out: Path, kind: str) -> None:
    """Add an adapter with random values to the base; save it and its logits."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(1)
    model, _ = load_model(base, model_config=_rotary(base))
    model.set_dtype(mx.float32)
    ids = mx.array([list(range(270, 307))])
    logits = {"base": model(ids)}
    model.freeze()
    parameters = {"rank": 4, "scale": 6.0, "dropout": 0.0}
    if kind == "embedding":
        parameters["keys"] = ["model.embed_tokens", "self_attn.q_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=kind == "dora")
    tensors = dict(tree_flatten(model.trainable_parameters()))
    spread = {name: 0.02 * mx.abs(value).max() if name.endswith(".m") else 0.02 for name, value in tensors.items()}
    moved = {name: value + spread[name] * mx.random.normal(value.shape) for name, value in tensors.items()}
    model.load_weights(list(moved.items()), strict=False)
    model.eval()
    logits["adapted"] = model(ids)
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    settings = {"fine_tune_type": "dora" if kind == "dora" else "lora", "num_layers": len(model.layers)}
    save_config({**settings, "lora_parameters": parameters, "model": "somebody/base"}, out / "adapter_config.json")
    mx.save_safetensors(f"{out}.logits.safetensors", {name: value.astype(mx.float32) for name, value in logits.items()})


def _rotary(base: Path) -> dict[str, float]:
    """The settings of config.json that mlx-lm expects under older names."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    return {"rope_theta": theta, "rotary_emb_base": theta, "rotary_pct": 0.5}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4])
