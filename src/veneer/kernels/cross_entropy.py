"""The output head and the cross-entropy of its logits in one step, over supervised tokens only.

    ce_k = logsumexp(h_k W^T + b) - (h_k W^T + b)[target_k],      total = sum_k weight_k * ce_k

The vocabulary is the widest dimension of a language model: the logits of all tokens, their softmax and its gradient are often larger
than all other tensors of a step. Here tokens go through the head one chunk at a time. When the softmax of a chunk is known, so is
its gradient,

    d total / d h_k = weight_k * (softmax(h_k W^T + b) - onehot(target_k)) W

so it is computed in forward and multiplied in backward by the gradient of ``total``. No tensor of size [tokens, vocabulary]
exists. On a CPU the softmax walks over a chunk in blocks of rows that fit the cache, or row by row in C++
(``cpp/cross_entropy.cpp``). The gradient of the head's weight, where the head is trained, is summed over chunks the same way.

Tokens of weight zero are skipped: their target may be anything, and a NaN in their hidden state does not spread. Logits are
rounded to the dtype of the hidden states, as the model's own head rounds them; the softmax is computed in fp32 (fp64 for fp64).

Shapes: K tokens, D hidden size, V vocabulary. Soft-capped or scaled logits are not supported.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.cpp_library import KINDS, library
from veneer.kernels.device_bytes import device_bytes
from veneer.kernels.forms import forms
from veneer.kernels.frozen_linear import linear
from veneer.kernels.tuning import (
    CROSS_ENTROPY_BLOCK_BYTES,
    CROSS_ENTROPY_CHUNK_BYTES,
    CROSS_ENTROPY_CHUNK_TOKENS,
    EXACT_SUM_ROWS,
    GPU_CHUNK_SHARE,
    GPU_CROSS_ENTROPY_CHUNK_BYTES,
)

__all__ = ["linear_cross_entropy", "linear_token_losses", "plain"]

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def plain(
    hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_K: Tensor, weights_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the reference, with the logits of all tokens; arguments and results as in ``linear_cross_entropy``."""
    wide = torch.promote_types(hidden_KD.dtype, torch.float32)
    live = weights_K != 0
    logits = F.linear(hidden_KD[live], weight_VD, bias_V).to(wide)
    ce = F.cross_entropy(logits, targets_K[live], reduction="none")
    losses_K = ce.new_zeros(len(targets_K)).masked_scatter(live, ce)
    total = (ce * weights_K[live].to(wide)).sum()
    return total, losses_K.detach()


def linear_cross_entropy(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    weights_K: Tensor,
    *,
    all_count: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of the tokens' cross-entropies.

    Args:
        hidden_KD: hidden states that the head sees.
        weight_VD, bias_V: the head.
        targets_K: token ids, long.
        weights_K: factor of each token's loss, a constant; 0 skips the token.
        all_count: no weight is 0, so the host need not wait for the device to look for them.

    Returns:
        (total, losses_K): the sum of weight times loss in nats, which can be backpropagated once; and the unweighted losses of the
        tokens, detached, 0 where the weight is 0. Both fp32 (fp64 for fp64).
    """
    enabled = torch.is_grad_enabled()
    needs_grad = tuple(enabled and t is not None and t.requires_grad for t in (hidden_KD, weight_VD, bias_V))
    fused: Any = _Fused.apply
    live = None if all_count else (weights_K != 0).nonzero().squeeze(1)
    if live is None or len(live) == len(targets_K):
        return fused(hidden_KD, weight_VD, bias_V, targets_K, weights_K, needs_grad)  # type: ignore[no-any-return]
    chosen = [t.index_select(0, live) for t in (hidden_KD, targets_K, weights_K)]
    total, losses = fused(chosen[0], weight_VD, bias_V, chosen[1], chosen[2], needs_grad)
    return total, losses.new_zeros(len(targets_K)).index_copy_(0, live, losses)


def linear_token_losses(hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_K: Tensor) -> Tensor:
    """Compute the cross-entropy of each token with a gradient, for losses that are not a weighted sum of them.

    Args:
        hidden_KD: hidden states that the head sees.
        weight_VD, bias_V: the head, which is frozen.
        targets_K: token ids, long.

    Returns:
        The losses [K] in nats; fp32 (fp64 for fp64). They can be backpropagated once, to ``hidden_KD``.
    """
    losses: Any = _TokenLosses.apply
    needs_grad = torch.is_grad_enabled() and hidden_KD.requires_grad
    return losses(hidden_KD, weight_VD, bias_V, targets_K, needs_grad)  # type: ignore[no-any-return]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_K: Tensor, needs_grad: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden_KD.dtype, torch.float32)
        ones_K = torch.ones(len(targets_K), dtype=wide, device=hidden_KD.device)
        losses_K, sums = _chunked(hidden_KD, weight_VD, bias_V, targets_K, ones_K, (needs_grad, False, False))
        ctx.save_for_backward(sums[0])
        return losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_KD,) = ctx.saved_tensors
        return d_hidden_KD * grad_K.to(d_hidden_KD.dtype).unsqueeze(1), None, None, None, None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_K: Tensor,
        weights_K: Tensor,
        needs_grad: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_KD.dtype, torch.float32)
        weights_K = weights_K.detach().to(wide)
        losses_K, sums = _chunked(hidden_KD, weight_VD, bias_V, targets_K, weights_K, needs_grad)
        ctx.save_for_backward(*sums)
        ctx.mark_non_differentiable(losses_K)
        return (losses_K * weights_K).sum(), losses_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if s is None else s * grad.to(s.dtype) for s in ctx.saved_tensors), None, None, None)


def _chunked(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_K: Tensor,
    weights_K: Tensor,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor, Grads]:
    """The losses [K], and the gradients of their weighted sum, chunk by chunk."""
    losses_K = torch.empty(len(targets_K), dtype=weights_K.dtype, device=hidden_KD.device)
    sums = _empty_like(hidden_KD, weight_VD, bias_V, needs_grad)
    step = _chunk(len(targets_K), weight_VD.shape[0], hidden_KD.element_size(), hidden_KD.device)
    for at in range(0, len(targets_K), step):
        part = slice(at, at + step)
        logits = linear(hidden_KD[part], weight_VD, bias_V)
        losses_K[part] = _softmax_gradient_(logits, targets_K[part], weights_K[part], any(needs_grad))
        _accumulate_(sums, part, logits, hidden_KD, weight_VD)
    return losses_K, sums


def _empty_like(
    hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs_grad: tuple[bool, bool, bool]
) -> Grads:
    """Allocate the gradients that are needed; sums over chunks begin at zero."""
    return (
        torch.empty_like(hidden_KD) if needs_grad[0] else None,
        torch.zeros_like(weight_VD) if needs_grad[1] else None,
        torch.zeros_like(bias_V) if needs_grad[2] and bias_V is not None else None,
    )


def _accumulate_(sums: Grads, part: slice, d_logits: Tensor, hidden_KD: Tensor, weight_VD: Tensor) -> None:
    """Add one chunk's part to the gradients; ``d_logits`` is d total / d logits of the chunk."""
    hidden, weight, bias = sums
    if hidden is not None:
        if len(d_logits) < EXACT_SUM_ROWS and d_logits.dtype == torch.float32 and d_logits.is_cpu:
            hidden[part] = (F.pad(d_logits, (0, 0, 0, EXACT_SUM_ROWS - len(d_logits))) @ weight_VD)[: len(d_logits)]
        else:
            torch.mm(d_logits, weight_VD, out=hidden[part])
    if weight is not None:
        weight.addmm_(d_logits.T, hidden_KD[part])
    if bias is not None:
        bias += d_logits.sum(0)


def _softmax_gradient_(logits: Tensor, targets_k: Tensor, weights_k: Tensor, grad: bool) -> Tensor:
    """Compute the losses of a chunk [k]; with ``grad``, overwrite ``logits`` by weight * (softmax - onehot)."""
    losses = torch.empty_like(weights_k)
    if _in_cpp(logits, targets_k, weights_k, losses, grad):
        return losses
    for part in _blocks(logits):
        block = logits[part]
        # The logits are not needed again, so wide ones are overwritten.
        wide = block if block.dtype == weights_k.dtype else block.to(weights_k.dtype)
        target, weight = targets_k[part].unsqueeze(1), weights_k[part].unsqueeze(1)
        top = wide.amax(1, keepdim=True)
        hit = wide.gather(1, target) - top
        total = wide.sub_(top).exp_().sum(1, keepdim=True)
        losses[part] = (total.log() - hit).squeeze(1)
        if grad:
            wide.mul_(weight / total).scatter_add_(1, target, -weight)
            if wide is not block:
                block.copy_(wide)
    return losses


def _in_cpp(logits: Tensor, targets_k: Tensor, weights_k: Tensor, losses_k: Tensor, grad: bool) -> bool:
    """Run ``_softmax_gradient_`` in C++ in one pass over the logits; return False if the kernel does not accept them."""
    made, kind = library(), KINDS.get(logits.dtype)
    if made is None or kind is None or logits.device.type != "cpu" or targets_k.dtype != torch.long:
        return False
    if not (logits.is_contiguous() and targets_k.is_contiguous() and weights_k.is_contiguous()):
        return False
    wrong: int = made.veneer_cross_entropy(
        kind,
        *(ctypes.c_void_p(logits.data_ptr()), *map(ctypes.c_long, logits.shape)),
        *(ctypes.c_void_p(t.data_ptr()) for t in (targets_k, weights_k, losses_k)),
        grad,
        torch.get_num_threads(),
    )
    if wrong:
        raise IndexError(f"{wrong} of {len(targets_k)} targets are outside the vocabulary of {logits.shape[1]}")
    return True


def _blocks(logits: Tensor) -> list[slice]:
    rows = (
        max(1, CROSS_ENTROPY_BLOCK_BYTES // (4 * logits.shape[1]))
        if logits.device.type == "cpu"
        else max(1, len(logits))
    )
    return [slice(at, at + rows) for at in range(0, len(logits), rows)]


def _chunk(tokens: int, vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Return the number of tokens per chunk: even chunks within the limit."""
    most = max(CROSS_ENTROPY_CHUNK_TOKENS, _chunk_bytes(device) // (vocabulary * itemsize))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _chunk_bytes(device: torch.device) -> int:
    """Return the limit of a chunk's logits. On a GPU it was chosen once for the run, or follows the memory of the device and not what is
    free now, so that a run and its resumption cut alike."""
    if device.type == "cpu":
        return CROSS_ENTROPY_CHUNK_BYTES
    if (chosen := forms().loss_chunk) is not None:
        return chosen
    total = device_bytes(device)
    return CROSS_ENTROPY_CHUNK_BYTES if total is None else min(GPU_CROSS_ENTROPY_CHUNK_BYTES, total // GPU_CHUNK_SHARE)
