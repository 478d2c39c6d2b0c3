"""Attention per segment: it equals attention written out for each segment alone, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from veneer.kernels.attention.segmented import plain, segment_attention
from veneer.kernels.attention.segments import Pattern, Segments

PATTERNS = {
    "causal": Pattern(),
    "window": Pattern(before=5),
    "wide window": Pattern(before=150),
    "all": Pattern(after=None),
    "both ways": Pattern(before=3, after=4),
}


def _inputs(
    lengths: tuple[int, ...], heads: int, groups: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], Segments]:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = ((heads, total, 8), (groups, total, 8), (groups, total, 6))
    tensors = [
        # stored as a model has them after its projections: tokens first
        torch.randn(total, count, size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(0, 1)
        .requires_grad_()
        for count, total, size in shapes
    ]
    return tensors, Segments.of(torch.tensor([0, *lengths]).cumsum(0))


def _written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
    *,
    scale: float,
    sinks_H: Any = None,
) -> torch.Tensor:
    """One head and one segment at a time, straight from the formula."""
    outs = torch.zeros(q.shape[1], q.shape[0], v.shape[2], dtype=q.dtype)
    repeats = q.shape[0] // k.shape[0]
    for start, end in zip(segments.bounds, segments.bounds[1:], strict=False):
        for h in range(q.shape[0]):
            scores = q[h, start:end] @ k[h // repeats, start:end].T * scale
            if pattern.softcap is not None:
                scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
            for i in range(end - start):
                for j in range(end - start):
                    far_back = pattern.before is not None and j < i - pattern.before
                    if far_back or (pattern.after is not None and j > i + pattern.after):
                        scores[i, j] = float("-inf")
            if sinks_H is not None:
                scores = torch.cat([scores, sinks_H[h].expand(end - start, 1)], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : end - start]
            outs = outs.index_put((torch.arange(start, end), torch.tensor(h)), weights @ v[h // repeats, start:end])
    return outs


def _run(
    form: Callable[..., torch.Tensor], tensors: list[torch.Tensor], *args: Any, **kwargs: Any
) -> list[torch.Tensor]:
    """Values, and gradients of a fixed direction in them."""
    out = form(*tensors, *args, **kwargs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, direction)]


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative L2 error over values and gradients."""
    return max(
        ((one.double() - other.double()).norm() / other.double().norm()).item()
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_plain_is_the_formula(pattern: Pattern) -> None:
    """In float64 values and gradients equal the loops over heads, queries and keys."""
    tensors, segments = _inputs((5, 9, 1, 5, 0, 14), 4, 2, torch.float64)
    expected = _run(_written_out, tensors, segments, pattern, scale=0.3)
    assert _worst(_run(plain, tensors, segments, pattern, scale=0.3), expected) <= 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_soft_caps_and_sinks_follow_the_formula(softcap: float | None, sinks: bool) -> None:
    """Scores bend before the softmax, and a sink takes its share of the weight."""
    tensors, segments = _inputs((5, 9, 5), 4, 2, torch.float64)
    pattern = Pattern(before=6, softcap=softcap)
    sinks_H = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64) if sinks else None
    expected = _run(_written_out, tensors, segments, pattern, scale=0.6, sinks_H=sinks_H)
    assert _worst(_run(segment_attention, tensors, segments, pattern, scale=0.6, sinks_H=sinks_H), expected) <= 1e-12


def test_a_nan_stays_in_its_segment() -> None:
    """Values and gradients of the other segments keep their bits, whichever of q, k and v the NaN stands in."""
    for which in range(3):
        tensors, segments = _inputs((9, 9, 4, 30), 4, 2, torch.float32)
        clean = _run(plain, tensors, segments, Pattern(), scale=0.3)
        with torch.no_grad():
            tensors[which][:, 11] = float("nan")
        spoilt = _run(plain, tensors, segments, Pattern(), scale=0.3)
        assert spoilt[0][9:18].isnan().any()
        for dim, (one, other) in zip((0, 1, 1, 1), zip(clean, spoilt, strict=True), strict=True):
            for start, count in ((0, 9), (18, 34)):
                assert torch.equal(one.narrow(dim, start, count), other.narrow(dim, start, count))


def test_order_of_segments_does_not_matter() -> None:
    """Two segments swapped give the same rows, swapped."""
    tensors, segments = _inputs((7, 12), 4, 2, torch.float64)
    swap = torch.cat([torch.arange(7, 19), torch.arange(7)])
    out = plain(*tensors, segments, Pattern(), scale=0.3)
    swapped = plain(*(x[:, swap] for x in tensors), Segments((0, 12, 19)), Pattern(), scale=0.3)
    assert torch.allclose(swapped, out[swap], atol=1e-13)


def test_nothing_in_gives_nothing_out() -> None:
    """A batch without tokens has a result without rows."""
    tensors, segments = _inputs((0,), 4, 2, torch.float32)
    assert plain(*tensors, segments, Pattern(), scale=0.3).shape == (0, 4, 6)


def test_dropout_drops_weights_and_keeps_their_expectation() -> None:
    """With constant values each row of the result is a sum of kept weights over (1 - p): one on average, and not one."""
    tensors, segments = _inputs((64, 64), 4, 2, torch.float32)
    ones = torch.ones_like(tensors[2])
    torch.manual_seed(0)
    out = plain(tensors[0], tensors[1], ones, segments, Pattern(after=None), scale=0.1, dropout=0.5)
    assert abs(out.mean().item() - 1) < 0.02 and out.std().item() > 0.05
