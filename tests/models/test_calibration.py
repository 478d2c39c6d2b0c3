"""Calibrated quantization: the outputs on given inputs change less, in the unchanged format, on every kind of decoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.tiny import tiny

from veneer.data.batch import make_batch
from veneer.data.example import Example
from veneer.errors import BaseModelError
from veneer.kernels.quantized.calibrated import quantize_calibrated
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize, shape_of, state_of, weight_of
from veneer.models.flat import FlatRunner
from veneer.models.quantized.calibration import quantize_in_place
from veneer.models.quantized.loading import quantized_names
from veneer.models.quantized.scheme import Scheme


def examples() -> list[Example]:
    """Random sequences of several lengths."""
    draw = torch.Generator().manual_seed(0)
    lengths = (12, 30, 25, 7, 40, 33)
    ids = [torch.randint(3, 320, (length,), generator=draw).tolist() for length in lengths]
    return [Example(tuple(one), (0.0, *[1.0] * (len(one) - 1)), "random") for one in ids]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(24, 128), (33, 51)], ids=["whole blocks", "blocks across rows"])
def test_outputs_change_less_than_by_rounding(shape: tuple[int, int], format: str, double: bool) -> None:
    """On inputs with correlated features the error of the outputs is at most 0.85 of plain rounding's; scales and files are those of the
    format, and features that are never used do no harm."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw) * 0.05
    x = torch.randn(400, 12, generator=draw) @ torch.randn(12, shape[1], generator=draw)
    x += 0.3 * torch.randn(x.shape, generator=draw)
    x[:, 5] = 0
    plain = quantize(weight, format, double=double)
    made = quantize_calibrated(weight, x.T @ x, format, double=double)
    errors = [float((x @ (one.dequantize(dtype=torch.float32) - weight).T).norm()) for one in (made, plain)]
    assert errors[0] < 0.85 * errors[1]
    assert all(torch.equal(made.scales[name], scale) for name, scale in plain.scales.items())
    assert torch.equal(weight_of(state_of(made), shape_of(state_of(made))).dequantize(), made.dequantize())


def test_without_inputs_it_is_plain_rounding() -> None:
    """A layer that only zeros reached gets the nearest values; inputs of one direction, with singular moments, are not an error."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = quantize_calibrated(weight, torch.zeros(64, 64), "nf4")
    assert torch.equal(made.stored, quantize(weight, "nf4").stored)
    x = torch.ones(1, 64)
    found = quantize_calibrated(weight, x.T @ x, "nf4").dequantize()
    assert (found.sum(1) - weight.sum(1)).abs().max() < (quantize(weight, "nf4").dequantize() - weight).sum(
        1
    ).abs().max()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_a_model_is_quantized_block_by_block(arch: str) -> None:
    """Every linear layer is replaced, and the final states on the texts are nearer to the plain model's than after plain rounding."""
    model: Any = tiny(arch)
    plain, rounded = copy.deepcopy(model), copy.deepcopy(model)
    names = quantized_names(model, None)
    for name in names:
        layer = rounded.get_submodule(name)
        turned = layer.weight.T.contiguous() if arch == "gpt2" else layer.weight
        values = quantize(turned.detach(), "nf4").dequantize()
        layer.weight.data.copy_(values.T if arch == "gpt2" else values)
    batches = [make_batch(part, "texts") for part in (examples()[:3], examples()[3:])]
    done: list[int] = []
    left = quantize_in_place(FlatRunner(model), batches, Scheme("nf4"), lambda count, of: done.append(count))
    assert left == [] and done == [1, 2]
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)
    with torch.no_grad():
        exact, near, far = (FlatRunner(one).hidden(batches[0]) for one in (plain, model, rounded))
    assert (near - exact).norm() < 0.85 * (far - exact).norm()


def test_a_model_without_blocks_is_refused() -> None:
    """Falcon's layers are not plain linear ones, so that no block has any to calibrate."""
    with pytest.raises(BaseModelError, match="FalconForCausalLM has no list of blocks"):
        quantize_in_place(FlatRunner(tiny("falcon")), [make_batch(examples(), "texts")], Scheme("nf4"))
