"""Intruder dimensions: leading directions of a fine-tuned weight that the base did not have (Shuttleworth et al. 2024, arXiv 2410.21228).

    W' = U' S' V'^T,   W = U S V^T;      u'_j of the first k is an intruder where max_i |cos(u'_j, u_i)| < threshold

LoRA makes them where full fine-tuning does not, and their number goes with how much is forgotten. Scaling them down,

    W'  +  sum over intruders (lambda - 1) s'_j u'_j v'_j^T,

takes back much of the forgetting for little of the task. That is a change of low rank, so the mitigated adapter is an adapter again,
with one rank more for each intruder.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.deltas.build import Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta, Term, Weights, site_delta
from veneer.deltas.linalg import dense_svd
from veneer.errors import ComposeError


@dataclass(frozen=True)
class Intruders:
    """Intruders among the first ``len(cosines)`` directions: their places (0 is the largest), and each direction's best cosine."""

    places: tuple[int, ...]
    cosines: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.places)


@dataclass(frozen=True)
class Reduced:
    """An adapter whose intruders were scaled down, and how many there were by site."""

    adapter: Adapter
    found: dict[str, int]


def find_intruders(weight_OK: Tensor, tuned_OK: Tensor, *, top_k: int = 10, threshold: float = 0.5) -> Intruders:
    """The intruders among the ``top_k`` leading left singular vectors of ``tuned_OK``.

    Raises ComposeError for settings out of range.
    """
    _check(top_k, threshold)
    ours = dense_svd(tuned_OK, top_k)[0]
    theirs, s, _ = dense_svd(weight_OK, min(weight_OK.shape))
    # Directions in which the base does nothing are no directions of the base.
    theirs = theirs[:, s > 1e-7 * s.max().clamp_min(1e-300)]
    if not theirs.shape[1]:
        return Intruders(tuple(range(ours.shape[1])), (0.0,) * ours.shape[1])
    cosines = (theirs.T @ ours).abs().max(0).values
    places = [place for place, value in enumerate(cosines.tolist()) if value < threshold]
    return Intruders(tuple(places), tuple(round(value, 6) for value in cosines.tolist()))


def reduce_intruders(
    adapter: Adapter,
    weights: Weights,
    *,
    name: str = "reduced",
    keep: float = 0.75,
    top_k: int = 10,
    threshold: float = 0.5,
) -> Reduced:
    """The adapter with every intruder scaled to the share ``keep`` of its singular value (the paper's lambda).

    Raises ComposeError where there is no intruder, or a setting is out of range.
    """
    if not 0 <= keep < 1:
        raise ComposeError(f"keep: expected a share of 0 or more and below 1, found {keep:g}")
    tensors: dict[str, Tensors] = {}
    found: dict[str, int] = {}
    for site in adapter.tensors:
        weight_OK = weights(site).double()
        change = site_delta(adapter, site, weights)
        tuned_OK = weight_OK + change.dense(weight_OK)
        places = list(find_intruders(weight_OK, tuned_OK, top_k=top_k, threshold=threshold).places)
        found[site] = len(places)
        if places:
            u, s, vt = dense_svd(tuned_OK, top_k)
            away = Term(keep - 1, u[:, places] * s[places], vt[places])
            change = change + SiteDelta(change.geometry, (away,))
        tensors[site] = site_tensors(site, change, weight_OK if adapter.method.needs_base_weights else None)
    if not any(found.values()):
        raise ComposeError(
            f'the adapter "{adapter.name}" has no intruder among the {top_k} leading directions of any site, so there is nothing to reduce'
        )
    tied = adapter.method.ensure_weight_tying
    return Reduced(assemble(tensors, adapter.kinds, name, tied=tied), found)


def _check(top_k: int, threshold: float) -> None:
    if top_k < 1:
        raise ComposeError(f"top_k: expected 1 or more, found {top_k}")
    if not 0 < threshold <= 1:
        raise ComposeError(f"threshold: expected a cosine above 0 and up to 1, found {threshold:g}")
