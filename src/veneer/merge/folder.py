"""Merging into a folder: W' = W + sum_j w_j (W'_j - W) for every adapted weight, shard by shard, with the rounding error.

The base is read and written tensor by tensor; a weight is computed in fp32 (or wider) from the stored one, a block of rows at a time, and
rounded once, so a base larger than memory can be merged. The effect of rounding on the delta is measured on the written numbers
(`rounding.py`), and a merge that would lose the fine-tune to rounding is refused unless it is allowed.

A weight that two modules share is untied when only one of them is changed: both are written, and the config says so. An encoder-decoder
scales its logits by that setting, so its weights are never untied.

No model runs here; `fidelity.py` compares logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.adapters.methods import LoRA
from veneer.checkpoints.base_files import Skeleton, as_2d, as_stored, check_finite, check_float, fit
from veneer.checkpoints.model_folder import SHARD_BYTES, ModelWriter, write_model
from veneer.checkpoints.peft.portable import as_parameters
from veneer.checkpoints.tensors import dtype_name
from veneer.deltas.build import Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta
from veneer.deltas.linalg import dense_svd
from veneer.deltas.svd import from_svd
from veneer.errors import ComposeError
from veneer.merge.plan import MergedTensor, MergePlan, Mix, plan_merge
from veneer.merge.rounding import RoundingTotals, round_to

LEAST_KEPT = 0.95
"""The kept share of the delta below which a merge is refused. For weights in bf16 that is a delta of 0.35 % of them or less.

The kept share decides, not the error: error that is independent of the delta is the usual cost of bf16, but a lost part of the delta
cannot be recovered."""
REPORT = "merge_report.json"
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SiteLoss:
    """The effect of rounding on the delta at one site; `rounding.py` defines the numbers."""

    site: str
    ratio: float
    error: float
    kept: float
    unchanged: float
    left: float | None = None
    """The error that remains when the residual adapter acts on the merged model."""
    kept_with_residual: float | None = None


@dataclass
class MergeReport:
    """The result of a merge and its exactness. ``error``, ``kept`` and ``ratio`` are over all sites."""

    out: str
    dtype: str
    rounding: str
    parents: list[dict[str, Any]]
    sites: list[SiteLoss] = field(default_factory=list)
    error: float = 0.0
    kept: float = 1.0
    ratio: float = 0.0
    left: float | None = None
    kept_with_residual: float | None = None
    untied: list[list[str]] = field(default_factory=list)
    logits: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def worst(self, count: int = 5) -> list[SiteLoss]:
        """The sites with the largest error first."""
        return sorted(self.sites, key=lambda site: -site.error)[:count]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def merge_to_folder(
    mix: Mix,
    base: Skeleton,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    residual: int = 0,
    allow_rounding: bool = False,
    write_residual: Callable[[Adapter, Path], None] | None = None,
    check: Callable[[Path, MergeReport], None] | None = None,
) -> MergeReport:
    """Merge a weighted mix of adapters into a base, and write the model to ``out``.

    Args:
        mix: adapters with their weights.
        base: the base model's files.
        out: the new folder.
        dtype: of every weight in the new files; None keeps each as stored.
        rounding: "nearest", or "stochastic" (to bf16 only).
        seed: of stochastic rounding.
        shard_bytes: the largest size of one file.
        residual: rank of an adapter that holds the rounding error, passed to ``write_residual`` for the folder ``out/residual``.
        allow_rounding: write even if less than 95 % of the delta is kept.
        write_residual: writes the residual adapter into a folder.
        check: is called with the finished folder before it gets its name.

    Raises:
        ComposeError: the adapters do not fit the base, or less than 95 % of the delta is kept (with the residual, where there is one).
    """
    if not mix:
        raise ComposeError("there is nothing to merge; give at least one adapter")
    if rounding not in ("nearest", "stochastic"):
        raise ComposeError(f"rounding: expected nearest or stochastic, found {rounding!r}")
    fitted = [(fit(adapter, base), float(weight)) for adapter, weight in mix]
    for adapter, _ in fitted:
        check_finite(adapter)
    plan = plan_merge(fitted, base)
    parents = [{"name": adapter.name, "weight": weight} for adapter, weight in fitted]
    stored = " and ".join(sorted(base.folder.dtypes()))
    named = f"as stored, {stored}" if dtype is None else dtype_name(dtype)
    report = MergeReport(str(out), named, rounding, parents, untied=[list(group) for group in plan.untied])
    merger = _Merger(base, plan, dtype, rounding, seed, residual, report)

    def finished(folder: Path) -> None:
        if merger.factors and write_residual is not None:
            sites = {site: base.sites[site] for site in merger.factors}
            parameters = [f"{site}.weight" for site in as_parameters(base.model, sites)]
            write_residual(
                assemble(merger.factors, merger.kinds, "residual", parameters=parameters), folder / "residual"
            )
        if check is not None:
            check(folder, report)
        text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    with write_model(base.folder, out, _config(base, plan, dtype), shard_bytes=shard_bytes, check=finished) as writer:
        merger.write(writer)
        if not allow_rounding:
            _refuse_rounding(report)
    return report


@dataclass
class _Merger:
    """The state of one merge: totals over sites and the factors of the residual."""

    base: Skeleton
    plan: MergePlan
    dtype: torch.dtype | None
    rounding: str
    seed: int
    residual: int
    report: MergeReport
    total: RoundingTotals = field(default_factory=RoundingTotals)
    factors: dict[str, Tensors] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def write(self, writer: ModelWriter) -> None:
        """Write every tensor of the new model, in the order of the base's files."""
        for key, tensor in self.base.folder.tensors():
            if key in self.plan.replaced:
                continue
            target = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            for planned in self.plan.tensors.get(key, (MergedTensor(key, ""),)):
                merged = tensor.to(target)
                if planned.experts:
                    merged = self._merge_experts(planned, tensor, target)
                elif planned.changes:
                    merged = self._merge(planned, tensor, target)
                # a second name for an unchanged tensor needs memory of its own to be stored
                writer.put(planned.key, merged.clone() if planned.key != key and merged is tensor else merged)
        report, total = self.report, self.total
        report.error, report.kept, report.ratio = total.error, total.kept, total.ratio
        if self.residual and total.delta:
            report.left, report.kept_with_residual = total.left, total.kept_with_residual

    def _merge_experts(self, planned: MergedTensor, stored: Tensor, target: torch.dtype) -> Tensor:
        """A stack of experts with the changes of its sites, one expert after the other."""
        check_float(planned.key, stored)
        merged = stored.to(target, copy=True)
        for site, changes in planned.experts.items():
            one = replace(planned, key=site, site=site, kind="linear", changes=changes)
            self.base.view_of(site, merged).copy_(self._merge(one, self.base.view_of(site, stored), target))
        return merged

    def _merge(self, planned: MergedTensor, stored: Tensor, target: torch.dtype) -> Tensor:
        check_float(planned.key, stored)
        weight_OK = as_2d(stored, planned.kind)
        wide = torch.promote_types(stored.dtype, torch.float32)
        merged_OK = torch.empty(weight_OK.shape, dtype=target)
        residual = self.residual > 0 and planned.site in self.base.sites
        lost_OK = torch.empty(weight_OK.shape if residual else (0, 0))
        delta_OK = torch.empty_like(lost_OK)
        totals = RoundingTotals()
        stochastic = self.rounding == "stochastic"
        generator = torch.Generator().manual_seed(stream_seed(self.seed, planned.key)) if stochastic else None
        for start, block in _row_blocks(weight_OK):
            rows = slice(start, start + len(block))
            base = block.to(wide)
            delta = sum((change.rows(base, start) for change in planned.changes), torch.zeros_like(base))
            only = planned.changes[0].value if len(planned.changes) == 1 else None
            exact = base + delta if only is None else only(start, start + len(block)).to(wide)
            rounded = _rounded(exact, target, generator, planned.site)
            merged_OK[rows] = rounded
            totals.add(base, delta, rounded)
            if residual:
                lost_OK[rows], delta_OK[rows] = base + delta - rounded.to(wide), delta
        totals.remaining = totals.lost
        if residual:
            totals.remaining, totals.returned = self._keep_residual(planned.site, lost_OK, delta_OK)
        self.total = self.total + totals
        with_residual = (totals.left, totals.kept_with_residual) if residual and totals.delta else ()
        self.report.sites.append(
            SiteLoss(planned.site, totals.ratio, totals.error, totals.kept, totals.unchanged, *with_residual)
        )
        return as_stored(merged_OK, planned.kind, stored.shape).contiguous()

    def _keep_residual(self, site: str, lost_OK: Tensor, delta_OK: Tensor) -> tuple[float, float]:
        """Keep the best rank-R part of the rounding error: (the square of the rest, the inner product of the part and the delta)."""
        u, s, vt = dense_svd(lost_OK, self.residual, self.seed)
        geometry = self.base.sites[site].geometry
        kept = from_svd(SiteDelta(geometry), u, s, vt)
        self.factors[site], self.kinds[site] = site_tensors(site, kept, LoRA()), geometry.kind
        b, a = kept.factors()
        remaining = max(0.0, float(lost_OK.double().square().sum() - s.square().sum()))
        return remaining, float(((delta_OK.double() @ a.T) * b).sum())


def _rounded(exact: Tensor, target: torch.dtype, generator: torch.Generator | None, site: str) -> Tensor:
    if not bool(torch.isfinite(exact).all()):
        raise ComposeError(f"{site}: the merged weight holds values that are not finite")
    rounded = round_to(exact, target, generator)
    if not bool(torch.isfinite(rounded).all()):
        raise ComposeError(f"{site}: the merged weight does not fit the range of {target}; merge to float32")
    return rounded


def _row_blocks(weight_OK: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _ELEMENTS_AT_ONCE // max(1, weight_OK.shape[1]))
    for start in range(0, weight_OK.shape[0], step):
        yield start, weight_OK[start : start + step]


def _config(base: Skeleton, plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config with the new dtype, and untied where weights are no longer shared."""
    config = dict(base.folder.config)
    parts = [config]
    for name, value in config.items():
        if isinstance(value, dict) and "hidden_size" in value:
            config[name] = dict(value)
            parts.append(config[name])
    if plan.untied:
        for part in parts:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if dtype is not None:
        for part in parts:
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = dtype_name(dtype)
    return config


def _refuse_rounding(report: MergeReport) -> None:
    kept = report.kept if report.kept_with_residual is None else max(report.kept, report.kept_with_residual)
    if kept >= LEAST_KEPT:
        return
    worst = min(report.sites, key=lambda site: site.kept)
    raise ComposeError(
        f"this merge would round the fine-tune away: its change is {report.ratio:.2g} of the weights, and only {kept:.0%} of it would be "
        f"kept (least at {worst.site}: {worst.kept:.0%}); merge to --dtype float32, add --residual 16, use --rounding stochastic, or "
        "give --allow-rounding"
    )
