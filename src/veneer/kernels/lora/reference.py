"""The change that adapters make to one layer's output: the reference, computed by the plain path.

For tokens t and adapters j with weights w_tj, the output of an adapted layer is

    y_t = base_t + sum_j w_tj * [ (S_j - 1) (base_t - b) + S_j s_j B_j A_j x_t ]

with base_t = W x_t + b from the layer's own call, S_j = m_j / ||W + s_j B_j A_j||_row for DoRA and no S term for LoRA. It is the
mixed-batch formula y = C (xW^T) + sum_j w_tj x A_j^T B'_j^T + b with C = 1 + sum_j w_tj (S_j - 1), written per adapter: each
adapter touches only its own tokens, so base tokens cost nothing and keep their bits, and a NaN in one adapter stays in its tokens.

Shapes: N tokens, n an adapter's tokens, K in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdapterTerm:
    """One adapter's part at one site.

    tokens: those that it acts on, LongTensor [n], or None for all
    weight: w_tj, a float or a tensor [n] in the compute dtype
    low:    x_n -> s B A x_n, [n, O, ...]; None for a change that is not of low rank
    drop:   dropout on the low-rank branch's input, or None
    scale:  S [O, ...] shaped to broadcast over the output, or None for 1
    base:   None, or dropped x_n -> W x_n, for PEFT's form of DoRA dropout: the magnitude then scales this second base
            product instead of the layer's own output
    change: (x_n, base_n) -> the change, in place of ``low``, for methods that are not of low rank
    """

    tokens: Tensor | None
    weight: float | Tensor
    low: Callable[[Tensor], Tensor] | None = None
    drop: Callable[[Tensor], Tensor] | None = None
    scale: Tensor | None = None
    base: Callable[[Tensor], Tensor] | None = None
    change: Callable[[Tensor, Tensor], Tensor] | None = None


def adapted(y: Tensor, x: Tensor, bias: Tensor | None, terms: Sequence[AdapterTerm]) -> Tensor:
    """Add the adapters' changes to a layer's output.

    y: [N, O, ...] the base layer's own output; x: [N, ...] its input; bias: the layer's bias, shaped to broadcast, or None.
    Returns [N, O, ...] in y's dtype. With no terms it is y itself.
    """
    out = y
    for term in terms:
        x_n = x if term.tokens is None else x.index_select(0, term.tokens)
        if term.drop is not None:
            x_n = term.drop(x_n)
        if term.low is not None:
            change = term.low(x_n)
        elif term.change is not None:
            change = term.change(x_n, y if term.tokens is None else y.index_select(0, term.tokens))
        if term.scale is not None:
            change = change * term.scale.to(change.dtype) + magnitude_change(
                _base_product(y, x_n, bias, term), term.scale
            )
        if isinstance(term.weight, Tensor):
            change = change * term.weight.reshape(-1, *[1] * (change.dim() - 1))
        elif term.weight != 1.0:
            change = change * term.weight
        change = change.to(out.dtype)
        out = out + change if term.tokens is None else out.index_add(0, term.tokens, change)
    return out


def magnitude_change(product: Tensor, scale: Tensor) -> Tensor:
    """(S - 1) times a base product, which has no bias. S - 1 is small: it is taken in the scale's own precision and rounded once."""
    return (scale - 1).to(product.dtype) * product


def _base_product(y: Tensor, x_n: Tensor, bias: Tensor | None, term: AdapterTerm) -> Tensor:
    if term.base is not None:
        return term.base(x_n)
    product = y if term.tokens is None else y.index_select(0, term.tokens)
    return product if bias is None else product - bias
