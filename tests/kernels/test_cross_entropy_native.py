"""The softmax of the fused cross-entropy in C++: losses and gradients of its definition, row by row."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_cross_entropy import make, relative
from torch import Tensor

from veneer.kernels import cross_entropy
from veneer.kernels.cross_entropy import linear_cross_entropy, plain

pytestmark = pytest.mark.usefixtures("native_kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def pieces(k: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a trained model's spread, targets and weights."""
    draw = torch.Generator().manual_seed(V)
    logits = (torch.randn(k, V, generator=draw) * 4).to(dtype)
    return logits, torch.randint(0, V, (k,), generator=draw), torch.rand(k, generator=draw)


@DTYPES
@pytest.mark.parametrize("V", [3, 16, 63, 97, 160, 1003])
@pytest.mark.parametrize("wanted", [True, False])
def test_losses_and_gradients_of_a_chunk(dtype: torch.dtype, V: int, wanted: bool) -> None:
    """Vocabularies with and without a remainder; the logits stay where no gradient is wanted."""
    logits, targets, weights = pieces(9, V, dtype)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (slopes,) = torch.autograd.grad((expected * weights).sum(), exact)
    found = logits.clone()
    losses = torch.empty_like(weights)
    assert cross_entropy._in_cpp(found, targets, weights, losses, wanted)
    assert relative(losses, expected) < 1e-6
    if wanted:
        assert relative(found, slopes) < (1e-6 if dtype == torch.float32 else 4e-3)
    else:
        assert torch.equal(found, logits)


@DTYPES
def test_the_whole_kernel_equals_plain(dtype: torch.dtype) -> None:
    """Total, losses and the gradient of the hidden states."""
    args = make(70, 24, 97, dtype, True)
    total, losses = linear_cross_entropy(*args)
    (fused,) = torch.autograd.grad(total, args[0])
    reference, reference_losses = plain(*args)
    (expected,) = torch.autograd.grad(reference, args[0])
    assert relative(total, reference) < 1e-5 and relative(losses, reference_losses) < 1e-5
    assert relative(fused, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


@DTYPES
def test_rows_are_independent(dtype: torch.dtype) -> None:
    """A NaN stays in its row, extreme logits stay finite, and the number of threads changes no bit."""
    logits, targets, weights = pieces(9, 1003, dtype)
    logits[1] *= 1e4
    spoilt = logits.clone()
    spoilt[4, 17] = float("nan")
    found = []
    threads = torch.get_num_threads()
    try:
        for start, count in ((logits, 1), (logits, 3), (spoilt, 2)):
            torch.set_num_threads(count)
            own, losses = start.clone(), torch.empty_like(weights)
            cross_entropy._in_cpp(own, targets, weights, losses, True)
            found.append((own, losses))
    finally:
        torch.set_num_threads(threads)
    rest = torch.arange(9) != 4
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(found[0], found[2], strict=True))
    assert found[2][0][4].isnan().all() and found[2][1][4].isnan() and found[0][0].isfinite().all()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    """And nothing is written."""
    logits, targets, weights = pieces(4, 97, torch.float32)
    targets[2] = 97
    kept = logits.clone()
    with pytest.raises(IndexError, match="1 of 4 targets are outside the vocabulary of 97"):
        cross_entropy._in_cpp(logits, targets, weights, torch.empty(4), True)
    assert torch.equal(logits, kept)
    assert not cross_entropy._in_cpp(logits.double(), targets, weights.double(), torch.empty(4), True)
