"""Keep a new A factor orthogonal to those of earlier adapters, site by site, to reduce forgetting.

An adapter's change  s B A x  reads an input only through the rows of A. If the rows of a new A are orthogonal to those of an old A_i,
neither adapter responds to the directions that the other reads, so learning the new task disturbs the old one less.

    penalty      L + weight * sum_i ||A_i A^T||_F^2         O-LoRA (Wang et al. 2023, arXiv 2310.14152, equations 7 and 8):
                 dL/dA += 2 weight A O^T O                  reduces the overlap without forcing it to zero
    projection   A <- A (I - Q Q^T)                         Q [in, R]: an orthonormal basis of the old rows; applied to the initial A,
                                                            every gradient (before clipping and moments) and after every step

O [R, in] stacks the rows of all old A_i at a site. Old adapters are read and never changed. AdamW divides elementwise, which moves a
projected gradient out of the complement; that is why A is also projected after the step.

Shapes: r rank of the new adapter, R sum of the old ranks, in the inputs of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from veneer.adapters import Adapter
from veneer.errors import AdapterError

_NEGLIGIBLE = 1e-6
"""Old directions whose singular value is below this fraction of the largest are rounding errors."""
_A = ("lora_A", "lora_embedding_A")


class Orthogonality(Protocol):
    """Adjusts a job's steps."""

    def adjust_gradients(self) -> dict[str, float]:
        """Change the divided, unclipped gradients in place; returns metrics of the step."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step."""
        ...


class Penalty:
    """O-LoRA's penalty on the overlap of the new A with the old ones."""

    def __init__(self, adapter: Adapter, old: Sequence[Adapter], weight: float) -> None:
        """Raises AdapterError if no site has both a new and an old A."""
        self.weight = weight
        self._pairs = [(a, rows) for _, a, rows in _common_sites(adapter, old)]

    def adjust_gradients(self) -> dict[str, float]:
        """Add the penalty's gradient; returns the overlap, sum_i ||A_i A^T||_F^2 over all sites."""
        squares = []
        for a, old_RI in self._pairs:
            if a.grad is None:
                a.grad = torch.zeros_like(a)
            overlap_rR = a.detach().flatten(1) @ old_RI.T
            squares.append(overlap_rR.double().square().sum())
            a.grad.add_((overlap_rR @ old_RI).view_as(a), alpha=2 * self.weight)
        return {"overlap": _total(squares)}

    def after_step(self) -> None:
        """Does nothing."""


class Projection:
    """Keeps the new A in the orthogonal complement of the old ones."""

    def __init__(self, adapter: Adapter, old: Sequence[Adapter]) -> None:
        """Project the initial A. A restored A overwrites it.

        Raises AdapterError if no site has both a new and an old A, or if the old ones leave no direction at a site.
        """
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for site, a, old_RI in _common_sites(adapter, old):
            basis_IQ = _basis(old_RI)
            if basis_IQ.shape[1] >= basis_IQ.shape[0]:
                raise AdapterError(
                    f"{site}: the adapters in orthogonal_to use all of its {basis_IQ.shape[0]} inputs and leave none to learn; leave the "
                    "site out (exclude_modules), or use orthogonal=penalty"
                )
            self._pairs.append((a, basis_IQ))
        self.after_step()

    def adjust_gradients(self) -> dict[str, float]:
        """Remove the old directions from the gradients; returns the remaining overlap of A, in the units of `Penalty`."""
        squares = []
        for a, basis_IQ in self._pairs:
            squares.append((a.detach().flatten(1) @ basis_IQ).double().square().sum())
            if a.grad is not None:
                _remove_(a.grad, basis_IQ)
        return {"overlap": _total(squares)}

    def after_step(self) -> None:
        """Remove the old directions from A."""
        with torch.no_grad():
            for a, basis_IQ in self._pairs:
                _remove_(a, basis_IQ)


def _total(squares: Sequence[Tensor]) -> float:
    """The sum of numbers that may be on a device, read at once."""
    return float(sum(torch.stack(list(squares)).tolist()))


def _common_sites(adapter: Adapter, old: Sequence[Adapter]) -> list[tuple[str, nn.Parameter, Tensor]]:
    """(site, A, rows of all old A_i [R, in]) of each site with a new and an old A."""
    found = []
    for site, tensors in adapter.tensors.items():
        a = _factor_a(tensors)
        rows = [b.detach().flatten(1) for other in old if (b := _factor_a(other.tensors.get(site, {}))) is not None]
        if a is not None and rows:
            found.append((site, a, torch.cat(rows).to(a)))
    if not found:
        names = ", ".join(f'"{other.name}"' for other in old)
        raise AdapterError(
            f'"{adapter.name}" and the adapters in orthogonal_to ({names}) have no site in common; choose target_modules that they share'
        )
    return found


def _factor_a(tensors: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
    return next((tensors[key] for key in _A if key in tensors), None)


def _basis(rows_RI: Tensor) -> Tensor:
    """An orthonormal basis [in, Q] of the span of the rows."""
    _, values, right_QI = torch.linalg.svd(rows_RI.double(), full_matrices=False)
    basis_IQ: Tensor = right_QI[values > _NEGLIGIBLE * values.max()].T.to(rows_RI).contiguous()
    return basis_IQ


def _remove_(tensor: Tensor, basis_IQ: Tensor) -> None:
    """Subtract in place each row's component in the span of the basis; twice, since once leaves rounding errors."""
    flat_rI = tensor.flatten(1)
    for _ in range(2):
        flat_rI -= (flat_rI @ basis_IQ) @ basis_IQ.T
    if flat_rI.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat_rI.view_as(tensor))
