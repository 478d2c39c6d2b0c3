"""Intruder dimensions: leading directions of a fine-tuned weight that the base did not have (Shuttleworth et al. 2024, arXiv 2410.21228).

    W' = U' S' V'^T,   W = U S V^T;      u'_j of the first k is an intruder where max_i |cos(u'_j, u_i)| < threshold

LoRA makes them where full fine-tuning does not, and their number grows with forgetting. Scaling them down,

    W'  +  sum over intruders (lambda - 1) s'_j u'_j v'_j^T,

undoes much of the forgetting at a small cost for the task. That is a low-rank change, so the result is an adapter again, with one more
rank for each intruder.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.methods import low_rank
from veneer.deltas.build import Tensors, assemble, site_tensors
from veneer.deltas.delta import LowRankTerm, SiteDelta, Weights, site_delta
from veneer.deltas.linalg import Eigen, dense_svd_near, gram_eigh
from veneer.errors import ComposeError


@dataclass(frozen=True)
class Intruders:
    """Intruders among the first ``len(cosines)`` directions: their indices (0 is the largest), and each direction's best cosine."""

    indices: tuple[int, ...]
    cosines: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of intruders."""
        return len(self.indices)


@dataclass(frozen=True)
class ReducedAdapter:
    """An adapter whose intruders were scaled down, and their number by site."""

    adapter: Adapter
    found: dict[str, int]


def find_intruders(weight_OK: Tensor, tuned_OK: Tensor, *, top_k: int = 10, threshold: float = 0.5) -> Intruders:
    """Find the intruders among the ``top_k`` leading left singular vectors of ``tuned_OK``.

    Raises:
        ComposeError: a setting is out of range.
    """
    _check(top_k, threshold)
    base = gram_eigh(weight_OK)
    return _intruders(weight_OK, base, dense_svd_near(tuned_OK, top_k, base)[0], threshold)


def reduce_intruders(
    adapter: Adapter,
    weights: Weights,
    *,
    name: str = "reduced",
    keep: float = 0.75,
    top_k: int = 10,
    threshold: float = 0.5,
) -> ReducedAdapter:
    """Scale every intruder of an adapter to the share ``keep`` of its singular value (the paper's lambda).

    Raises:
        ComposeError: there is no intruder, or a setting is out of range.
    """
    _check(top_k, threshold)
    if not 0 <= keep < 1:
        raise ComposeError(f"keep: expected a share of 0 or more and below 1, found {keep:g}")
    method = low_rank(adapter.method, f'the adapter "{adapter.name}" has no low-rank change')
    tensors: dict[str, Tensors] = {}
    found: dict[str, int] = {}
    for site in adapter.tensors:
        weight_OK = weights(site).double()
        delta = site_delta(adapter, site, weights)
        base = gram_eigh(weight_OK)
        u, s, vt = dense_svd_near(weight_OK + delta.dense(weight_OK), top_k, base)
        indices = list(_intruders(weight_OK, base, u, threshold).indices)
        found[site] = len(indices)
        if indices:
            removed = LowRankTerm(keep - 1, u[:, indices] * s[indices], vt[indices])
            delta = delta + SiteDelta(delta.geometry, (removed,))
        tensors[site] = site_tensors(site, delta, method, weight_OK)
    if not any(found.values()):
        raise ComposeError(
            f'the adapter "{adapter.name}" has no intruder among the {top_k} leading directions of any site, so there is nothing to reduce'
        )
    tied = adapter.method.ensure_weight_tying
    return ReducedAdapter(assemble(tensors, adapter.kinds, name, method=method, tied=tied), found)


def _intruders(weight_OK: Tensor, base: Eigen, ours: Tensor, threshold: float) -> Intruders:
    """The intruders among orthonormal columns ``ours``, leading left singular vectors of the fine-tuned weight."""
    values, vectors = base
    s = values.sqrt()
    # Directions in which the base is zero up to rounding are not directions of the base.
    kept = s > 1e-6 * s.max().clamp_min(1e-300)
    if not bool(kept.any()):
        return Intruders(tuple(range(ours.shape[1])), (0.0,) * ours.shape[1])
    if weight_OK.shape[0] <= weight_OK.shape[1]:
        cosines = vectors[:, kept].T @ ours
    else:  # u_i = W v_i / s_i, without making all u_i
        cosines = vectors[:, kept].T @ (weight_OK.double().T @ ours) / s[kept].unsqueeze(1)
    best = cosines.abs().max(0).values.clamp_max(1).tolist()
    indices = tuple(index for index, value in enumerate(best) if value < threshold)
    return Intruders(indices, tuple(round(value, 6) for value in best))


def _check(top_k: int, threshold: float) -> None:
    if top_k < 1:
        raise ComposeError(f"top_k: expected 1 or more, found {top_k}")
    if not 0 < threshold <= 1:
        raise ComposeError(f"threshold: expected a cosine above 0 and up to 1, found {threshold:g}")
