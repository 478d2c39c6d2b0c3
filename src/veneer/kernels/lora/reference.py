"""The change that adapters make to one layer's output: plain form.

For cells t (rows or tokens) and adapters j with weights w_tj, the output of an adapted layer is

    y_t = base_t + sum_j w_tj * [ (S_j - 1) (base_t - b) + S_j s_j B_j A_j x_t ]

with base_t = W x_t + b from the layer's own call, S_j = m_j / ||W + s_j B_j A_j||_row for DoRA and no S term for LoRA. It is the
mixed-batch formula y = C (xW^T) + sum_j w_tj x A_j^T B'_j^T + b with C = 1 + sum_j w_tj (S_j - 1), written per adapter: each
adapter touches only its own cells, so base cells cost nothing and keep their bits, and a NaN in one adapter stays in its cells.

Boundary: functions of tensors. Who may act where is decided above; dropout masks come in ready made.
Shapes: N cells, n an adapter's cells, K in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One adapter's part at one site.

    rows:   cells that it acts on, LongTensor [n], or None for all
    weight: w_tj, a float or a tensor [n] in the compute dtype
    low:    x_n -> s B A x_n, [n, O, ...]
    drop:   dropout on the low-rank branch's input, or None
    gain:   S [O, ...] shaped to broadcast over the output, or None for 1
    base:   None, or dropped x_n -> W x_n, for PEFT's form of DoRA dropout: the gain's first part then takes this second base
            product instead of the layer's own output
    """

    rows: Tensor | None
    weight: float | Tensor
    low: Callable[[Tensor], Tensor]
    drop: Callable[[Tensor], Tensor] | None = None
    gain: Tensor | None = None
    base: Callable[[Tensor], Tensor] | None = None


def adapted(y: Tensor, x: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """Add the adapters' changes to a layer's output.

    y: [N, O, ...] the base layer's own output; x: [N, ...] its input; bias: the layer's bias, shaped to broadcast, or None.
    Returns [N, O, ...] in y's dtype. With no terms it is y itself.
    """
    out = y
    for term in terms:
        x_n = x if term.rows is None else x.index_select(0, term.rows)
        if term.drop is not None:
            x_n = term.drop(x_n)
        change = term.low(x_n)
        if term.gain is not None:
            change = change * term.gain.to(change.dtype) + _regained(y, x_n, bias, term)
        if isinstance(term.weight, Tensor):
            change = change * term.weight.reshape(-1, *[1] * (change.dim() - 1))
        elif term.weight != 1.0:
            change = change * term.weight
        change = change.to(out.dtype)
        out = out + change if term.rows is None else out.index_add(0, term.rows, change)
    return out


def _regained(y: Tensor, x_n: Tensor, bias: Tensor | None, term: Term) -> Tensor:
    """(S - 1) (base - b): what the gain does to the base's own product. The bias stays outside the gain."""
    assert term.gain is not None
    if term.base is not None:
        product = term.base(x_n)
    else:
        product = y if term.rows is None else y.index_select(0, term.rows)
        product = product if bias is None else product - bias
    # S - 1 is small: subtract in the gain's own precision, round once.
    return (term.gain - 1).to(product.dtype) * product
