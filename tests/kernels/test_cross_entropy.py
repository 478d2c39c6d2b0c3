"""The fused head and cross-entropy against its plain reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels import cross_entropy
from veneer.kernels.cross_entropy import linear_cross_entropy, plain

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(tokens: int, size: int, vocabulary: int, dtype: torch.dtype, bias: bool, seed: int = 0) -> list[Tensor]:
    """(hidden, weight, bias or empty, targets, weights) with logits of a spread like a trained model's."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocabulary, size, generator=draw, dtype=torch.float64) * 3 / size**0.5
    offset = torch.randn(vocabulary, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=draw)
    weights = torch.rand(tokens, generator=draw)
    parts = [hidden.to(dtype).requires_grad_(), weight.to(dtype), offset.to(dtype), targets, weights]
    return parts if bias else [*parts[:2], None, *parts[3:]]  # type: ignore[list-item]


def relative(a: Tensor, b: Tensor) -> float:
    """L2 distance over L2 norm."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-300))


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks hold 64 tokens and blocks three rows of a vocabulary of 97, so that both loops run several times."""
    monkeypatch.setattr(cross_entropy, "CROSS_ENTROPY_CHUNK_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "CROSS_ENTROPY_BLOCK_BYTES", 3 * 4 * 97)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_equals_plain(dtype: torch.dtype, bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Total, losses and the gradient of the hidden states are those of the definition, whatever arrives for the total."""
    small_pieces(monkeypatch)
    args = make(tokens, 24, 97, dtype, bias)
    total, losses = linear_cross_entropy(*args)
    (total * 0.37).backward()
    fused = args[0].grad
    args[0].grad = None
    reference, reference_losses = plain(*args)
    (reference * 0.37).backward()
    assert total.dtype == losses.dtype == reference.dtype == torch.promote_types(dtype, torch.float32)
    # The loss is fp32 arithmetic on equal logits; only the gradient passes through the rounding of the compute dtype.
    tight = TOLERANCE[dtype] if dtype == torch.float64 else 1e-5
    assert relative(total, reference) < tight and relative(losses, reference_losses) < tight
    assert fused is not None and fused.dtype == dtype and relative(fused, args[0].grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_head_that_is_trained_gets_its_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weight and bias require gradients (full fine-tuning), theirs are summed over all chunks."""
    small_pieces(monkeypatch)
    args = make(150, 24, 97, dtype, True)
    args[1].requires_grad_()
    args[2].requires_grad_()
    fused = torch.autograd.grad(linear_cross_entropy(*args)[0], args[:3])
    reference = torch.autograd.grad(plain(*args)[0], args[:3])
    assert all(relative(a, b) < TOLERANCE[dtype] for a, b in zip(fused, reference, strict=True))


def test_tokens_of_weight_zero_are_left_out() -> None:
    """A token without weight has loss 0 and gradient 0, even where its target is not a token and its hidden state is NaN."""
    hidden, weight, _, targets, weights = make(10, 8, 97, torch.float32, False)
    with torch.no_grad():
        hidden[3] = float("nan")
    targets[3] = -100
    weights[3] = 0
    total, losses = linear_cross_entropy(hidden, weight, None, targets, weights)
    total.backward()
    keep = torch.arange(10) != 3
    alone, alone_losses = linear_cross_entropy(hidden.detach()[keep], weight, None, targets[keep], weights[keep])
    assert torch.equal(total.detach(), alone) and torch.equal(losses[keep], alone_losses)
    assert losses[3] == 0 and hidden.grad is not None and torch.equal(hidden.grad[3], torch.zeros(8))


def test_nan_stays_in_its_token() -> None:
    """A NaN in one supervised token's hidden state reaches no other token's loss and gradient: those keep their bits."""
    args = make(70, 8, 97, torch.float32, False)
    linear_cross_entropy(*args)[0].backward()
    healthy, losses = args[0].grad, linear_cross_entropy(*args)[1]
    args[0].grad = None
    with torch.no_grad():
        args[0][5, 2] = float("nan")
    total, ill = linear_cross_entropy(*args)
    total.backward()
    others = torch.arange(70) != 5
    assert healthy is not None and args[0].grad is not None
    assert torch.isnan(ill[5]) and torch.isnan(args[0].grad[5]).any()
    assert torch.equal(ill[others], losses[others]) and torch.equal(args[0].grad[others], healthy[others])


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    """Logits in the thousands give the exact loss: the largest is subtracted first."""
    hidden = torch.tensor([[1000.0, 0.0]])
    weight = torch.tensor([[5.0, 0.0], [4.999, 0.0], [-5.0, 0.0]])
    total, _ = linear_cross_entropy(hidden, weight, None, torch.tensor([1]), torch.ones(1))
    assert float(total) == pytest.approx(1.0 + torch.log1p(torch.exp(torch.tensor(-1.0))).item(), rel=1e-3)


def test_no_tokens() -> None:
    """A batch without supervised tokens has loss 0 and a gradient of zeros."""
    hidden, weight, _, targets, _ = make(4, 8, 97, torch.float32, False)
    total, losses = linear_cross_entropy(hidden, weight, None, targets, torch.zeros(4))
    total.backward()
    assert float(total.detach()) == 0 and torch.equal(losses, torch.zeros(4))
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_nothing_as_large_as_the_logits_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation, forward or backward, makes a tensor of tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    small_pieces(monkeypatch)
    args = make(640, 8, 97, torch.float32, False)
    with Largest():
        linear_cross_entropy(*args)[0].backward()
    assert largest == 64 * 97


def test_without_gradients_none_is_formed() -> None:
    """Under no_grad the losses are the same and nothing is kept for backward."""
    args = make(20, 8, 97, torch.float32, False)
    with torch.no_grad():
        total, losses = linear_cross_entropy(*args)
    assert not total.requires_grad
    assert torch.equal(losses, linear_cross_entropy(*args)[1])


@pytest.mark.parametrize("rows", [1, 3, 7, 11])
def test_sums_over_a_large_vocabulary_keep_their_digits_with_few_rows(rows: int) -> None:
    """In fp32, with two threads too, the gradient is within a millionth of the exact one."""
    draw = torch.Generator().manual_seed(rows)
    hidden = (2 * torch.randn(rows, 64, generator=draw)).requires_grad_()
    weight = 0.05 * torch.randn(49_152, 64, generator=draw)
    targets, weights = torch.randint(0, 49_152, (rows,), generator=draw), torch.ones(rows)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear_cross_entropy(hidden, weight, None, targets, weights)[0].backward()
    finally:
        torch.set_num_threads(before)
    exact = hidden.detach().double().requires_grad_()
    plain(exact, weight.double(), None, targets, weights.double())[0].backward()
    assert hidden.grad is not None and exact.grad is not None
    assert float((hidden.grad - exact.grad).norm() / exact.grad.norm()) < 1e-6
