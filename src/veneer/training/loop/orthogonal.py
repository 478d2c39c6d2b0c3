"""Leave alone what older adapters read: two ways to keep a new A orthogonal to old ones, site by site.

An adapter's change  s B A x  sees an input only through the rows of A. If the rows of a new A are orthogonal to those of an old A_i, then
what the old adapter reads of an input is nothing that the new one answers to, and the other way round, so learning the new task disturbs
the old one less.

    penalty      L + weight * sum_i ||A_i A^T||_F^2         O-LoRA (Wang et al. 2023, arXiv 2310.14152, equations 7 and 8):
                 dL/dA += 2 weight A O^T O                  the overlap is pulled down, not forced to zero
    projection   A <- A (I - Q Q^T)                         Q [in, R]: an orthonormal basis of the old rows; the start, every gradient
                                                            (so that clipping and moments see what is left of it) and every step

with O [R, in] the rows of all old A_i at a site behind each other. Old adapters are read and never changed. AdamW divides elementwise,
which turns a projected gradient out of the complement again; that is why the step is projected as well.

Shapes: r rank of the new adapter, R sum of the old ranks, in the inputs of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.adapters import Adapter
from veneer.errors import AdapterError

_NEGLIGIBLE = 1e-6
"""Old directions whose singular value is below this part of the largest are rounding."""
_A = ("lora_A", "lora_embedding_A")


class Shaper(Protocol):
    """Bends a job's steps: called with the gradient divided and not yet clipped, and after each step."""

    def gradients(self) -> dict[str, float]:
        """Change the gradients in place; returns figures of the step."""
        ...

    def moved(self) -> None:
        """The step was taken."""
        ...


class Penalty:
    """O-LoRA's penalty on the overlap of the new A with the old ones."""

    def __init__(self, adapter: Adapter, old: Sequence[Adapter], weight: float) -> None:
        """Raises AdapterError where no site has both a new and an old A."""
        self.weight = weight
        self._pairs = [(a, rows) for _, a, rows in _shared(adapter, old)]

    def gradients(self) -> dict[str, float]:
        """Add the penalty's gradient; returns the overlap, sum_i ||A_i A^T||_F^2 over all sites."""
        total = 0.0
        for a, old_RI in self._pairs:
            if a.grad is None:
                a.grad = torch.zeros_like(a)
            overlap_rR = a.detach().flatten(1) @ old_RI.T
            total += float(overlap_rR.double().square().sum())
            a.grad.add_((overlap_rR @ old_RI).view_as(a), alpha=2 * self.weight)
        return {"overlap": total}

    def moved(self) -> None:
        """Nothing is forced."""


class Projection:
    """Keeps the new A in the orthogonal complement of the old ones."""

    def __init__(self, adapter: Adapter, old: Sequence[Adapter]) -> None:
        """Raises AdapterError where no site has both a new and an old A, or the old ones leave nothing at one."""
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for site, a, old_RI in _shared(adapter, old):
            basis_IQ = _basis(old_RI)
            if basis_IQ.shape[1] >= basis_IQ.shape[0]:
                raise AdapterError(
                    f"{site}: the adapters to be orthogonal to take all of its {basis_IQ.shape[0]} inputs, so nothing is left to learn "
                    "there; leave the site out (exclude_modules), or take orthogonal=penalty"
                )
            self._pairs.append((a, basis_IQ))

    def begin(self) -> None:
        """Take the old directions out of where A starts. Only before the first step: a resumed A has none."""
        self.moved()

    def gradients(self) -> dict[str, float]:
        """Take the old directions out of the gradients; returns what overlap is left, in the units of `Penalty`'s."""
        total = 0.0
        for a, basis_IQ in self._pairs:
            total += float((a.detach().flatten(1) @ basis_IQ).double().square().sum())
            if a.grad is not None:
                _remove_(a.grad, basis_IQ)
        return {"overlap": total}

    def moved(self) -> None:
        """Take the old directions out of A."""
        with torch.no_grad():
            for a, basis_IQ in self._pairs:
                _remove_(a, basis_IQ)


def _shared(adapter: Adapter, old: Sequence[Adapter]) -> list[tuple[str, nn.Parameter, Tensor]]:
    """(site, A, rows of all old A_i [R, in]) of each site where there are both."""
    found = []
    for site, own in adapter.tensors.items():
        a = _factor(own)
        rows = [b.detach().flatten(1) for other in old if (b := _factor(other.tensors.get(site, {}))) is not None]
        if a is not None and rows:
            found.append((site, a, torch.cat(rows).to(a)))
    if not found:
        names = ", ".join(f'"{other.name}"' for other in old)
        raise AdapterError(
            f'"{adapter.name}" is to be orthogonal to {names}, and there is no site where both act; choose target_modules that they share'
        )
    return found


def _factor(own: object) -> nn.Parameter | None:
    assert isinstance(own, dict)
    return next((own[key] for key in _A if key in own), None)


def _basis(rows_RI: Tensor) -> Tensor:
    """An orthonormal basis [in, Q] of the rows' span."""
    _, values, right_QI = torch.linalg.svd(rows_RI.double(), full_matrices=False)
    basis_IQ: Tensor = right_QI[values > _NEGLIGIBLE * values.max()].T.to(rows_RI).contiguous()
    return basis_IQ


def _remove_(tensor: Tensor, basis_IQ: Tensor) -> None:
    """Subtract in place what of each row lies in the basis' span; twice, since once leaves the rounding of the first."""
    flat_rI = tensor.flatten(1)
    for _ in range(2):
        flat_rI -= (flat_rI @ basis_IQ) @ basis_IQ.T
    if flat_rI.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat_rI.view_as(tensor))
