"""Merging into the weights of a quantized base, and merging to quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compose.made import METHODS, saved, trained

from veneer.adapters import Adapter, LoRA, attach
from veneer.checkpoints.base_files import skeleton
from veneer.errors import ComposeError
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize
from veneer.merge.fidelity import compare_logits
from veneer.merge.folder import merge_to_folder
from veneer.models.load import load_base
from veneer.models.quantized.scheme import scheme_for

IDS = torch.arange(3, 40).reshape(1, -1)


@torch.no_grad()
def logits(model: Any, mix: Any = None, *adapters: Adapter) -> torch.Tensor:
    bank = attach(model)
    for adapter in adapters:
        bank.insert(adapter)
    with bank.use(mix):
        found: torch.Tensor = model(input_ids=IDS)[0]
    return found


@pytest.mark.parametrize(
    ("arch", "format"), [("llama", "nf4"), ("gpt2", "int8"), ("mixtral", "nf4"), ("gpt_oss", "fp4")]
)
def test_the_base_of_training_is_merged_into(arch: str, format: str, tmp_path: Path) -> None:
    """Plain files taken in a format merge to the logits of the adapter on the base that was quantized while it was read."""
    saved(tmp_path / "base", arch)
    quantized = load_base(tmp_path / "base", dtype="float32", quantize=format).model
    adapter = trained(quantized, METHODS["dora"])
    expected = logits(quantized, "a", adapter)
    base = skeleton(tmp_path / "base", format)
    report = merge_to_folder([(adapter, 1.0)], base, tmp_path / "out")
    assert torch.allclose(logits(load_base(tmp_path / "out", dtype="float32").model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(load_base(tmp_path / "base", dtype="float32").model, "a", adapter), expected)
    assert f"in {format}, whose weights differ from the plain ones by" in report.notes[0]
    found = compare_logits(base, tmp_path / "out", [(adapter, 1.0)])
    assert found is not None and found.merged < 1e-5 < found.change


def test_merged_weights_are_quantized(tmp_path: Path) -> None:
    """The files hold the quantized form of what a plain merge writes; the report has its error, and unchanged layers are quantized too."""
    adapter = trained(saved(tmp_path / "base"), LoRA(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")))
    base = skeleton(tmp_path / "base")
    merge_to_folder([(adapter, 1.0)], base, tmp_path / "plain")
    report = merge_to_folder([(adapter, 1.0)], base, tmp_path / "nf4", scheme=scheme_for("nf4"), allow_rounding=True)
    plain, model = (load_base(tmp_path / name, dtype="float32").model for name in ("plain", "nf4"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    lost = total = 0.0
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.data
        assert torch.equal(layer.quantized.dequantize(), quantize(weight, "nf4").dequantize())
        if name in adapter.tensors:
            apart = layer.quantized.squared_error(weight)
            lost, total = lost + apart[0], total + base.weight_2d(name).square().sum().item()
    assert report.distance == pytest.approx((lost / total) ** 0.5, rel=1e-2) and report.format == "nf4"


def test_a_base_in_4_bits_is_merged_to_4_bits_only_if_the_change_survives(tmp_path: Path) -> None:
    """A small change is lost between the steps of the format: refused with the share that is kept, unless a residual adapter keeps it.
    Layers that no adapter changes keep their bytes."""
    model = saved(tmp_path / "base")
    merge_to_folder([(trained(model), 0.0)], skeleton(tmp_path / "base"), tmp_path / "four", scheme=scheme_for("nf4"))
    base = skeleton(tmp_path / "four")
    adapter = trained(model, LoRA(r=2, lora_alpha=2, target_modules=("v_proj",)))
    with pytest.raises(ComposeError, match=r"round the fine-tune away.* leave --to nf4 out, add --residual 16"):
        merge_to_folder([(adapter, 0.02)], base, tmp_path / "lost", scheme=scheme_for("nf4"))
    kept: list[Adapter] = []
    report = merge_to_folder(
        [(adapter, 0.02)],
        base,
        tmp_path / "out",
        scheme=scheme_for("nf4"),
        residual=64,
        write_residual=lambda made, _: kept.append(made),
    )
    assert report.kept < 0.95 < (report.kept_with_residual or 0.0)
    expected = logits(load_base(tmp_path / "four", dtype="float32").model, {"a": 0.02}, adapter)
    merged = load_base(tmp_path / "out", dtype="float32").model
    assert torch.allclose(logits(merged, "residual", *kept), expected, atol=1e-4)
    assert compare_logits(base, tmp_path / "out", [(adapter, 0.02)]) is not None
    before = load_base(tmp_path / "four", dtype="float32").model.state_dict()
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in before.items() if "v_proj" not in name)


def test_another_format_than_that_of_the_files_is_refused(tmp_path: Path) -> None:
    """A base in one format is not taken in another."""
    model = saved(tmp_path / "base")
    merge_to_folder([(trained(model), 0.0)], skeleton(tmp_path / "base"), tmp_path / "four", scheme=scheme_for("nf4"))
    with pytest.raises(ComposeError, match="quantized to nf4, and cannot be quantized to int8"):
        skeleton(tmp_path / "four", "int8")
