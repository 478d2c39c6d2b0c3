"""Folders in which stacked experts are quantized too: written, loaded, merged into, and refused by other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compose.made import METHODS, saved, trained

from veneer.adapters import attach
from veneer.checkpoints.base_files import skeleton
from veneer.checkpoints.quantized_folder import quantize_to_folder
from veneer.errors import BaseModelError
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.merge.folder import merge_to_folder
from veneer.models.fingerprint import tensor_fingerprint
from veneer.models.load import load_base
from veneer.models.quantized.scheme import scheme_for

IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.mark.parametrize(("arch", "format"), [("qwen3_moe", "nf4"), ("gpt_oss", "int8"), ("mixtral", "fp4")])
def test_experts_are_quantized_on_disk(arch: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder loads to the bits of the base that is quantized while it is read, and adapters are merged into it as on that."""
    saved(tmp_path / "plain", arch)
    report = quantize_to_folder(skeleton(tmp_path / "plain"), tmp_path / "out", scheme_for(format), experts=True)
    assert report.stacks == 4 and report.experts == 0 and 0 < report.error < 0.2
    read = load_base(tmp_path / "plain", dtype="float32", quantize=format).model
    model: Any = load_base(tmp_path / "out", dtype="float32").model
    expected, found = read.state_dict(), model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if "quant_state" not in name)
    adapter = trained(model, METHODS["dora"])
    bank = attach(model)
    bank.insert(adapter)
    with torch.no_grad(), bank.use("a"):
        adapted = model(input_ids=IDS)[0]
    files, site = skeleton(tmp_path / "out"), "model.layers.1.mlp.experts.2.down_proj"
    quantized = [key for key in files.folder.files if files.folder.quantized(key) is not None]
    shapes = {key: tuple(files.folder.get(key).shape) for key in quantized}
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeight, "dequantize", None)  # shapes are in the headers
        assert quantized and {key: files.folder.shape(key) for key in quantized} == shapes
    assert files.fingerprints([site])[site] == tensor_fingerprint(f"{site}.weight", bank.sites[site].weight_2d)
    assert files.format(site) == format
    merge_to_folder([(adapter, 1.0)], files, tmp_path / "merged")
    with torch.no_grad():
        merged = load_base(tmp_path / "merged", dtype="float32").model(input_ids=IDS)[0]
    assert torch.allclose(merged, adapted, atol=1e-5)


def test_other_programs_and_damaged_folders(tmp_path: Path) -> None:
    """transformers refuses the folder instead of drawing experts at random; a damaged stack is named; by default experts stay plain."""
    import transformers

    saved(tmp_path / "plain", "qwen3_moe")
    report = quantize_to_folder(skeleton(tmp_path / "plain"), tmp_path / "linear", scheme_for("nf4"))
    assert report.stacks == 0 and report.experts > 0
    quantize_to_folder(skeleton(tmp_path / "plain"), tmp_path / "out", scheme_for("nf4"), experts=True)
    load_base(tmp_path / "out")  # transformers knows the format now, and nothing of this call remains
    with pytest.raises(BaseModelError, match=r"config.json names the format veneer, which veneer\.load_base reads"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    known = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    held = {name: known.pop(name) for name in ["veneer"] if name in known}  # as where Veneer has not been imported
    try:
        with pytest.raises(RuntimeError, match="mismatch"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    finally:
        known.update(held)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    stack = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{stack}.weight.absmax"] = tensors[f"{stack}.weight.absmax"][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"layers.1.mlp.experts.down_proj: absmax: expected 32 blocks"):
        load_base(tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["stacks"]["model.layers.9.mlp.experts.down_proj"] = 4
    (tmp_path / "out" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"layers.9.mlp.experts.down_proj: the files hold it as quantized experts"):
        load_base(tmp_path / "out", dtype="float32")
