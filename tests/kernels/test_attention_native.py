"""Segment attention in C++: it equals the plain form in values and gradients, whatever the segments, and whatever the threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.test_segment_attention import PATTERNS, _run, _worst

from veneer.kernels.attention import segmented as room
from veneer.kernels.attention.native import native, takes
from veneer.kernels.attention.segmented import plain, segment_attention
from veneer.kernels.attention.segments import Pattern, Segments

pytestmark = pytest.mark.usefixtures("native_kernels")

LENGTHS = {
    "equal": (16, 16, 16),
    "ragged": (9, 1, 20, 33, 300, 4),
    "with empty": (7, 0, 5),
    "in parts": (600, 31, 257),
}
CAUSAL = Pattern()
HEADS = {"own keys": (3, 3, 16, 16), "shared": (6, 2, 64, 64), "two sizes": (9, 3, 32, 48), "wide": (4, 1, 128, 80)}


def draw(
    lengths: tuple[int, ...], heads: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[list[torch.Tensor], Segments]:
    """q, k, v as projections leave them, tokens first."""
    count, groups, size, wide = heads
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    tensors = [
        torch.randn(total, h, d, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1).requires_grad_()
        for h, d in ((count, size), (groups, size), (groups, wide))
    ]
    return tensors, Segments.of(torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_is_the_plain_form(lengths: tuple[int, ...], pattern: Pattern, heads: tuple[int, int, int, int]) -> None:
    """In float32 against float64 to 1e-5; in bfloat16 its error is at most three times that of PyTorch's attention."""
    tensors, segments = draw(lengths, heads, torch.float32)
    exact = _run(plain, [x.detach().double().requires_grad_() for x in tensors], segments, pattern, scale=0.2)
    assert _worst(_run(native, tensors, segments, pattern, scale=0.2), exact) <= 1e-5

    rough, _ = draw(lengths, heads, torch.bfloat16)
    exact = _run(plain, [x.detach().double().requires_grad_() for x in rough], segments, pattern, scale=0.2)
    found, stock = (_run(form, rough, segments, pattern, scale=0.2) for form in (native, plain))
    for one, other, true in zip(found, stock, exact, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        assert _worst([one], [true]) <= 3 * max(_worst([other], [true]), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    """Scores of hundreds, of either sign, neither overflow nor lose the rows whose highest is low."""
    tensors, segments = draw((40, 21), (4, 2, 32, 32), dtype)
    with torch.no_grad():
        tensors[0].mul_(30)
        tensors[1].mul_(30)
    exact = _run(plain, [x.detach().double().requires_grad_() for x in tensors], segments, Pattern(), scale=0.2)
    found = _run(native, tensors, segments, Pattern(), scale=0.2)
    assert all(x.isfinite().all() for x in found)
    assert _worst(found[:1], exact[:1]) <= (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    """Sums are taken in one order, also over the parts of a long segment."""
    tensors, segments = draw((700, 50, 130), (6, 2, 64, 64), dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_run(native, tensors, segments, Pattern(), scale=0.2))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_a_nan_stays_in_its_segment(which: int, dtype: torch.dtype) -> None:
    """Values and gradients of the other segments keep their bits, and its own token shows it."""
    tensors, segments = draw((9, 9, 4, 30), (4, 2, 16, 16), dtype)
    clean = _run(native, tensors, segments, Pattern(), scale=0.3)
    with torch.no_grad():
        tensors[which][:, 11] = float("nan")
    spoilt = _run(native, tensors, segments, Pattern(), scale=0.3)
    assert spoilt[0][11].isnan().all()
    for dim, (one, other) in zip((0, 1, 1, 1), zip(clean, spoilt, strict=True), strict=True):
        for start, count in ((0, 9), (18, 34)):
            assert torch.equal(one.narrow(dim, start, count), other.narrow(dim, start, count))


def test_tensors_are_read_and_written_where_they_lie() -> None:
    """Parts of one projection, heads first or tokens first, give the same bits; gradients lie as [T, H, D]."""
    tensors, segments = draw((20, 13), (4, 2, 32, 32), torch.bfloat16)
    joint = torch.cat([x.detach().transpose(0, 1) for x in tensors], 1).transpose(0, 1)
    parts = [x.requires_grad_() for x in joint.split([4, 2, 2])]
    heads_first = [x.detach().contiguous().requires_grad_() for x in tensors]
    first = _run(native, tensors, segments, Pattern(), scale=0.2)
    for others in (parts, heads_first):
        again = _run(native, others, segments, Pattern(), scale=0.2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    out = native(*tensors, segments, Pattern(), scale=0.2)
    spread = torch.ones_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    found = torch.autograd.grad(out, tensors, spread)
    assert out.is_contiguous() and all(x.transpose(0, 1).is_contiguous() for x in found)


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    """Forward alone gives the bits of a forward that is differentiated."""
    tensors, segments = draw((20, 13), (4, 2, 32, 32), torch.bfloat16)
    out = native(*tensors, segments, Pattern(), scale=0.2)
    with torch.no_grad():
        assert torch.equal(native(*tensors, segments, Pattern(), scale=0.2), out)


def test_the_rule_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in float32 and without gradients; not for soft caps, sinks, dropout, other dtypes and head sizes, or very long segments."""
    taken: list[bool] = []
    monkeypatch.setattr(room, "supported", lambda: True)  # whatever the processor of the test
    monkeypatch.setattr(room, "native", lambda *args, **kwargs: taken.append(True) or native(*args, **kwargs))
    plain_heads = (4, 2, 32, 32)

    def took(
        *tensors: torch.Tensor, pattern: Pattern = CAUSAL, lengths: tuple[int, ...] = (20, 13), **more: Any
    ) -> bool:
        taken.clear()
        segments = Segments.of(torch.tensor([0, *lengths]).cumsum(0))
        segment_attention(tensors[0], tensors[1], tensors[2], segments, pattern, scale=1.0, **more)
        return bool(taken)

    for dtype in (torch.float32, torch.bfloat16):
        tensors, _ = draw((20, 13), plain_heads, dtype)
        assert took(*tensors)
        with torch.no_grad():
            assert took(*tensors)
    assert not took(*tensors, pattern=Pattern(softcap=3.0))
    assert not took(*tensors, dropout=0.5) and not took(*tensors, sinks_H=torch.zeros(4))
    assert not took(*(x.double() for x in tensors))
    assert not took(*draw((20, 13), (4, 2, 24, 32), torch.float32)[0])
    assert not took(*draw((0,), plain_heads, torch.float32)[0], lengths=(0,))
    assert not took(*draw((4097,), (1, 1, 16, 16), torch.float32)[0], lengths=(4097,))
    assert takes(*tensors)
    monkeypatch.setattr(room, "supported", lambda: False)
    assert not took(*tensors)
    room_of_others = [x.expand(-1, -1, 32)[..., ::2].expand(-1, -1, 16) for x in tensors]
    assert not takes(*room_of_others)
