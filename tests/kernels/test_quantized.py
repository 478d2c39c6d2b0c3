"""Quantized weights: bit for bit those of bitsandbytes, in torch and in C++, and products that keep no dense weight."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.kernels.quantized.four_bit import FP4, NF4, FourBit, absmax_map, code_of
from veneer.kernels.quantized.int8 import Int8
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.product import quantized_linear
from veneer.kernels.quantized.state import quantize, shape_of, state_of, weight_of
from veneer.kernels.quantized.weight import QuantizedWeight

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb() -> Any:
    """The functions of bitsandbytes."""
    return pytest.importorskip("bitsandbytes").functional


def cases(count: int) -> Iterator[tuple[Tensor, type[FourBit], bool, int]]:
    """Weights of many sizes and scales with a format; widths that no block divides, rows of zeros and odd counts are among them."""
    chosen, draw = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(count):
        shape = chosen.randint(1, 70), chosen.choice([64, 128, 96, 33, 7, 1, 50, 256, 100])
        weight = torch.randn(shape, generator=draw) * 10 ** chosen.uniform(-3, 1)
        if number % 20 == 0:
            weight[0] = 0
        made = weight.to(chosen.choice(DTYPES))
        yield made, chosen.choice([NF4, FP4]), chosen.random() < 0.5, chosen.choice([32, 64, 128, 256])


def check(bnb: Any, count: int) -> None:
    """Quantize as bitsandbytes does, and dequantize as it does where its kernels agree with each other."""
    for weight, made, double, block in cases(count):
        packed, state = bnb.quantize_4bit(weight, quant_type=made.format, blocksize=block, compress_statistics=double)
        found = made.quantize(weight, double=double, block=block)
        assert torch.equal(found.packed, packed)
        assert torch.equal(found.absmax, state.absmax)
        assert (found.outer is None) is (state.state2 is None)
        if found.outer is not None:
            assert torch.equal(found.outer, state.state2.absmax) and found.offset == float(state.offset)
        if weight.shape[1] % block == 0:
            theirs = bnb.dequantize_4bit(packed, state)
            assert torch.equal(found.dequantize(), theirs if len(packed) > 1 else theirs.T)
        else:
            assert torch.equal(found.dequantize(), by_hand(packed, state, bnb))
        again = weight_of(state_of(found), shape_of(state_of(found)))
        assert torch.equal(again.dequantize(), found.dequantize())


def by_hand(packed: Tensor, state: Any, bnb: Any) -> Tensor:
    """code[q] * absmax over the flat numbers, from what bitsandbytes stored."""
    absmax = state.absmax
    if state.state2 is not None:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    q = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[: state.shape.numel()].long()
    scale = absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return (state.code[q] * scale).to(state.dtype).view(state.shape)


def test_four_bits_are_those_of_bitsandbytes(bnb: Any) -> None:
    """Packed numbers, absmax, double quantization and dequantized values are equal to the bit."""
    assert torch.equal(absmax_map(CPU), bnb.create_dynamic_map())
    assert torch.equal(code_of("nf4", CPU), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(code_of("fp4", CPU), bnb.get_4bit_type("fp4", device="cpu"))
    check(bnb, 100)


@pytest.mark.slow
def test_a_thousand_matrices_are_those_of_bitsandbytes(bnb: Any) -> None:
    """The same on a thousand matrices."""
    check(bnb, 1000)


def test_int8_is_that_of_bitsandbytes(bnb: Any) -> None:
    """Rows of int8, their absmax and dequantized values are equal to the bit."""
    draw = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        weight = torch.randn(33, 40, generator=draw).to(dtype)
        values, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        found = Int8.quantize(weight)
        assert torch.equal(found.values, values) and torch.equal(found.absmax, absmax)
        assert torch.equal(found.dequantize(), bnb.int8_vectorwise_dequant(values, absmax))
    assert Int8.quantize(torch.zeros(2, 3)).dequantize().eq(0).all()


@pytest.mark.usefixtures("native_kernels")
def test_the_kernel_gives_the_bits_of_the_form_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows and some, in every data type, from C++ and from torch."""
    from veneer.kernels import cpp_library

    for weight, made, double, block in cases(100):
        rows = slice(len(weight) // 3, len(weight) // 3 * 2)
        for quantized in (made.quantize(weight, double=double, block=block), Int8.quantize(weight)):
            found = [quantized.dequantize(part, dtype) for part in (None, rows) for dtype in DTYPES]
            with monkeypatch.context() as plain:
                plain.setattr(cpp_library._state, "library", None)
                expected = [quantized.dequantize(part, dtype) for part in (None, rows) for dtype in DTYPES]
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_rows_and_norms_are_those_of_the_whole(format: str) -> None:
    """Rows are dequantized by themselves; norms are taken a chunk at a time."""
    weight = quantize(torch.randn(19, 37, generator=torch.Generator().manual_seed(0)), format)
    dense = weight.dequantize()
    assert torch.equal(weight.dequantize(slice(5, 11)), dense[5:11])
    assert torch.allclose(weight.squared_norms(), dense.float().square().sum(1))
    assert weight.dequantize(slice(4, 4)).shape == (0, 37)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_product_keeps_no_dense_weight(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward no dense weight lives; the gradient is that of the dense layer."""
    weight = quantize(torch.randn(7, 33, generator=torch.Generator().manual_seed(0)), format)
    made: list[weakref.ref[Tensor]] = []
    original = type(weight).dequantize

    def noted(self: QuantizedWeight, *args: Any, **options: Any) -> Tensor:
        dense = original(self, *args, **options)  # type: ignore[arg-type]
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(type(weight), "dequantize", noted)
    x = torch.randn(4, 33, requires_grad=True)
    bias = torch.randn(7)
    y = quantized_linear(x, weight, bias)
    gc.collect()
    assert made and all(one() is None for one in made)
    y.square().sum().backward()
    dense = original(weight)  # type: ignore[arg-type]
    other = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(other, dense, bias).square().sum().backward()
    assert len(made) == 2 and torch.equal(x.grad, other.grad)  # type: ignore[arg-type]


def test_scales_keep_their_type_when_a_model_is_cast() -> None:
    """A cast changes the compute type and neither the packed numbers nor the scales."""
    layer = QuantizedLinear(quantize(torch.randn(8, 64), "nf4", double=False), torch.randn(8))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16 and layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    after = layer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "bias")
    assert after["weight.absmax"].dtype == torch.float32


STATE: dict[str, Any] = {
    "weight": lambda t: t[:-1],
    "weight.absmax": lambda t: t[:-1],
    "weight.quant_map": lambda t: t.flip(0),
}


@pytest.mark.parametrize("name", STATE)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    """Fewer bytes, fewer blocks or another map are named, and the layer keeps what it has."""
    layer = QuantizedLinear(quantize(torch.randn(8, 64), "nf4"))
    before = layer.state_dict()
    broken = {**before, name: STATE[name](before[name])}
    with pytest.raises(RuntimeError, match=r"expected|are not those"):
        layer.load_state_dict(broken)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer.load_state_dict(before)
