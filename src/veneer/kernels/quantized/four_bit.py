"""NF4 and FP4, as bitsandbytes stores them: blocks of consecutive numbers, each with its largest absolute value.

    w = code[q] * absmax[block]        q: four bits, two to a byte, the first in the high half

Blocks run over the rows one behind the other. With double quantization the absmax are bytes themselves, in blocks of 256:

    absmax = map[byte] * absmax'[block'] + offset

(Dettmers et al. 2023, arXiv 2305.14314, section 3.) Quantizing and dequantizing give the same bits as bitsandbytes 0.50, which quantizes
absmax by a table of 65,536 steps. One of its CPU kernels lets blocks begin anew in every row; where the width of a row is not a multiple of
the block, this file agrees with its others, CUDA's among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from veneer.kernels.quantized.native import FOUR_BITS, WeightView, dequantize_rows, view_of
from veneer.kernels.quantized.weight import QuantizedWeight

__all__ = ["BLOCKS", "FP4", "NF4", "OUTER", "FourBit", "absmax_map", "code_of", "nearest", "pack"]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Sizes of a block that bitsandbytes knows."""
OUTER = 256
"""Size of a block of absmax."""
_STEPS = 65536
_TINY = 1e-38
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_CODES = {"nf4": _NF4, "fp4": (*_FP4, *(-value for value in _FP4))}


@lru_cache
def code_of(format: str, device: torch.device) -> Tensor:
    """The 16 values of a format, scaled to [-1, 1], in fp32."""
    values = torch.tensor(_CODES[format], dtype=torch.float32, device=device)
    return values / values.abs().max()


@lru_cache
def absmax_map(device: torch.device) -> Tensor:
    """The 256 values that quantized absmax take: seven decades with one bit more of fraction each ("dynamic" in bitsandbytes)."""
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (decade - 6)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class FourBit(QuantizedWeight):
    """A weight of four bits a number.

    Attributes:
        packed: uint8 [ceil(O K / 2), 1].
        absmax: fp32 [blocks], or uint8 with double quantization.
        outer: absmax' [ceil(blocks / 256)] of double quantization, else None.
        offset: added to the absmax of double quantization.
    """

    format: ClassVar[str]
    bits: ClassVar[float] = 4.5

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block: int = 64
    outer: Tensor | None = None
    offset: float = 0.0

    @classmethod
    def quantize(cls, weight_OK: Tensor, *, double: bool = True, block: int = 64) -> FourBit:
        """Quantize a weight; ``double`` quantizes the absmax of its blocks too."""
        packed, absmax = _quantize(weight_OK, cls.format, block)
        made = cls(packed, absmax, weight_OK.shape, weight_OK.dtype, block)
        if not double:
            return made
        offset = absmax.mean()
        small, outer = _quantize_absmax(absmax - offset)
        return replace(made, absmax=small, outer=outer, offset=float(offset))

    @property
    def stored(self) -> Tensor:
        return self.packed

    @property
    def scales(self) -> Mapping[str, Tensor]:
        return {"absmax": self.absmax, **({} if self.outer is None else {"nested_absmax": self.outer})}

    @property
    def settings(self) -> list[object]:
        return [str(self.dtype).removeprefix("torch."), self.block, self.offset]

    def with_tensors(self, stored: Tensor, scales: Mapping[str, Tensor]) -> FourBit:
        return replace(self, packed=stored, absmax=scales["absmax"], outer=scales.get("nested_absmax"))

    def block_scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The absmax of blocks from ``first`` up to ``last``, in fp32."""
        part = self.absmax[first:last]
        if self.outer is None:
            return part
        at = torch.arange(first, first + len(part), device=part.device) // OUTER
        return absmax_map(part.device)[part.long()] * self.outer[at] + self.offset

    def native(self) -> WeightView | None:
        device = self.packed.device
        double = None if self.outer is None else (absmax_map(device), self.outer, self.offset)
        return view_of(
            FOUR_BITS,
            self.shape[1],
            self.packed,
            self.absmax,
            code=code_of(self.format, device),
            block=self.block,
            rounding=self.dtype,
            double=double,
        )

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        out, k = self.shape
        start, stop, _ = (rows or slice(None)).indices(out)
        stop = max(start, stop)
        found = dequantize_rows(self.native(), start, stop, dtype or self.dtype)
        if found is None:
            found = _values(self, start * k, stop * k).to(self.dtype).to(dtype or self.dtype).view(-1, k)
        return found


class NF4(FourBit):
    """NormalFloat: the 16 values are quantiles of the normal distribution."""

    format = "nf4"


class FP4(FourBit):
    """A sign, two bits of exponent, one of fraction."""

    format = "fp4"


def _values(weight: FourBit, first: int, last: int) -> Tensor:
    """Numbers ``first`` up to ``last`` in fp32, by torch: the reference of the kernel in C++."""
    device, block = weight.packed.device, weight.block
    packed = weight.packed.view(-1)[first // 2 : (last + 1) // 2]
    q = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[first % 2 :][: last - first]
    begin = first // block
    scale = weight.block_scales(begin, -(-last // block)).repeat_interleave(block)[first - begin * block :]
    return code_of(weight.format, device)[q.long()] * scale[: last - first]


@torch.no_grad()
def _quantize(weight: Tensor, format: str, block: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax): each number of a block as the nearest value, halves towards the lower."""
    flat = weight.reshape(-1).float()
    full = flat.numel() - flat.numel() % block
    blocks, rest = flat[:full].view(-1, block), flat[full:]
    absmax = blocks.abs().amax(1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY).view(-1, 1))).clamp(-1, 1).view(-1)
    if rest.numel():
        most = rest.abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, most.view(1)])
        scaled = torch.cat([scaled, (rest / most).clamp(-1, 1)])
    return pack(nearest(scaled, format), format), absmax


def nearest(scaled: Tensor, format: str) -> Tensor:
    """The four bits of the value nearest to each number of [-1, 1], as uint8; halves towards the lower."""
    code = code_of(format, scaled.device)
    order = code.argsort()
    q = torch.bucketize(scaled, (code[order[:-1]] + code[order[1:]]) / 2, out_int32=True)
    return (q if format == "nf4" else order[q]).to(torch.uint8)


def pack(q: Tensor, format: str) -> Tensor:
    """Four bits for each of n numbers, two to a byte, [ceil(n / 2), 1]; a zero is the last of an odd number."""
    if q.numel() % 2:
        q = torch.cat([q, nearest(torch.zeros(1, device=q.device), format)])
    return (q[::2] << 4 | q[1::2]).unsqueeze(1)


@torch.no_grad()
def _quantize_absmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes, absmax') of values around zero."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % OUTER)).view(-1, OUTER)
    outer = padded.abs().amax(1)
    scaled = (padded * (1.0 / outer).view(-1, 1)).clamp(-1, 1)
    # bitsandbytes computes the step in one fused operation: in fp64 nothing is rounded before the end.
    step = ((scaled + 1.0).double() * (0.5 * (_STEPS - 1)) + 0.5).float()
    table = _absmax_table(values.device)
    found = torch.where(outer.view(-1, 1) == 0, 0, table[step.nan_to_num(0).long()])
    return found.view(-1)[:count].to(torch.uint8), outer


@lru_cache
def _absmax_table(device: torch.device) -> Tensor:
    """The nearest value of `absmax_map` for each of 65,536 steps from -1 to 1."""
    values = absmax_map(device)
    steps = torch.arange(_STEPS, dtype=torch.float32, device=device) * 2.0 / (_STEPS - 1) - 1.0
    return torch.bucketize(steps, (values[:-1] + values[1:]) * 0.5)
