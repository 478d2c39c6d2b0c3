"""Attention through PyTorch's kernel for sequences of several lengths, with that kernel written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.devices import PretendDevice
from tests.kernels.reference_varlen import reference_varlen

from veneer.kernels.attention import varlen as varlen_file
from veneer.kernels.attention.segmented import plain
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.kernels.attention.varlen import takes, varlen

PATTERNS = (Pattern(), Pattern(before=2), Pattern(after=None), Pattern(before=3, after=1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("knows", [{"enable_gqa", "num_splits"}, set()], ids=["2.13", "2.11"])
def test_it_gives_what_the_plain_form_gives(pattern: Pattern, knows: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, ragged with an empty segment, grouped heads, windows; with older versions of PyTorch heads are repeated."""
    calls: list[Any] = []
    monkeypatch.setattr(varlen_file, "_kernel", lambda: (reference_varlen(calls), frozenset(knows)))
    segments = Segments((0, 5, 5, 6, 13))
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(heads, 13, 8, dtype=torch.float64, generator=draw) for heads in (4, 2, 2)]
    found = []
    for form in (plain, varlen):
        q, k, v = (t.clone().requires_grad_() for t in made)
        out = form(q, k, v, segments, pattern, scale=0.3)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert len(calls) == 1
    assert calls[0]["num_splits"] == (1 if knows else None) and calls[0]["enable_gqa"] == bool(knows)


def test_tensors_that_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 and fp16 on a GPU of compute capability 8.0, heads of one size up to 256; anything else is the plain form's."""
    q, v, wide = (torch.zeros(2, 3, size, dtype=torch.bfloat16) for size in (64, 32, 512))
    assert not takes(q, q, q)
    with PretendDevice() as device:
        q, v, wide = (t.to(device.device) for t in (q, v, wide))
        for capability, good in (((9, 0), True), ((7, 5), False)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert takes(q, q, q) is good
            assert not takes(q, q, v) and not takes(wide, wide, wide) and not takes(q.float(), q.float(), q.float())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(varlen_file, "_kernel", lambda: (None, frozenset({"is_causal"})))  # PyTorch 2.10
        assert not takes(q, q, q)
