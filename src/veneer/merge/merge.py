"""Merging into a folder: W' = W + sum_j w_j (W'_j - W) for every adapted weight, shard by shard, with its error told.

The base is read tensor by tensor and written tensor by tensor; a weight is computed in fp32 (or wider) from the stored one, a block of
rows at a time, and rounded once. So a base larger than memory can be merged. What rounding does to the change is measured on
the numbers that are written (`rounding.py`), and a merge that would round the fine-tune away is refused unless asked for.

A weight that two modules share comes apart when only one of them is changed: both are written and the config says so. An
encoder-decoder scales its logits by that setting, so there it is refused.

Boundary: files in, files out; no model runs here (`fidelity.py` compares logits).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter, stream_seed
from veneer.adapters.methods import LoRA
from veneer.checkpoints.base_files import Skeleton, as_2d, as_stored, check_finite, check_float, fit
from veneer.checkpoints.model_folder import SHARD_BYTES, ModelWriter, write_model
from veneer.deltas.linalg import dense_svd
from veneer.errors import ComposeError
from veneer.merge.plan import Mix, Piece, Plan, plan_merge
from veneer.merge.rounding import Kept, round_to

LEAST_KEPT = 0.95
"""The part of the whole change below which a merge is refused. For weights in bf16 that is a change of 0.35 % of them or less.

What counts is the part and not the error: error that has nothing to do with the change is no more than what storing in bf16 costs any
weight, while a part that is gone is gone."""
REPORT = "merge_report.json"
_ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SiteLoss:
    """What rounding did to the change at one site; see `rounding.py` for the figures."""

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
    """What a merge wrote and how exact it is. ``error``, ``kept``, ``ratio`` are those of all sites together."""

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
    """Write the base with a weighted mix of adapters in it to ``out``.

    dtype: of every weight in the new files; None keeps each as stored. rounding: "nearest" or "stochastic" (to bf16). residual: rank
    of an adapter that holds what rounding lost, handed to ``write_residual`` for the folder ``out/residual``. check: looks at the
    finished folder before it gets its name.

    Raises ComposeError where the adapters do not fit, or where less than 95 % of the whole change is kept and ``allow_rounding`` is
    not given (what a residual brings back counts).
    """
    if not mix:
        raise ComposeError("there is nothing to merge: give at least one adapter")
    fitted = [(fit(adapter, base), float(weight)) for adapter, weight in mix]
    for adapter, _ in fitted:
        check_finite(adapter)
    plan = plan_merge(fitted, base)
    parents = [{"name": adapter.name, "weight": weight} for adapter, weight in fitted]
    stored = " and ".join(sorted(base.folder.dtypes()))
    named = f"as stored, {stored}" if dtype is None else _dtype_name(dtype)
    report = MergeReport(str(out), named, rounding, parents, untied=[list(group) for group in plan.untied])
    work = _Work(base, plan, dtype, rounding, seed, residual, report)

    def finished(folder: Path) -> None:
        if residual and write_residual is not None:
            write_residual(work.residual_adapter(), folder / "residual")
        if check is not None:
            check(folder, report)
        text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    with write_model(base.folder, out, _config(base, plan, dtype), shard_bytes=shard_bytes, check=finished) as writer:
        work.write(writer)
        if not allow_rounding:
            _refuse_rounding(report)
    return report


class _Work:
    """The state of one merge: totals over sites and the factors of the residual."""

    def __init__(
        self,
        base: Skeleton,
        plan: Plan,
        dtype: torch.dtype | None,
        rounding: str,
        seed: int,
        residual: int,
        report: MergeReport,
    ) -> None:
        if rounding not in ("nearest", "stochastic"):
            raise ComposeError(f"rounding: expected nearest or stochastic, found {rounding!r}")
        self.base, self.plan, self.dtype, self.seed, self.residual, self.report = (
            base,
            plan,
            dtype,
            seed,
            residual,
            report,
        )
        self.stochastic = rounding == "stochastic"
        self.total = Kept()
        self.left = self.returned = 0.0
        self.factors: dict[str, dict[str, Tensor]] = {}

    def write(self, writer: ModelWriter) -> None:
        """Every tensor of the new model, in the order of the base's files."""
        for key, tensor in self.base.folder.tensors():
            if key in self.plan.replaced:
                continue
            target = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            for piece in self.plan.pieces.get(key, (Piece(key, ""),)):
                merged = self._merge(piece, tensor, target) if piece.sources else tensor.to(target)
                # a second name for an unchanged tensor needs memory of its own to be stored
                writer.put(piece.key, merged.clone() if piece.key != key and merged is tensor else merged)
        report, total = self.report, self.total
        report.error, report.kept, report.ratio = total.error, total.kept, total.ratio
        if self.residual and total.delta:
            report.left = (self.left / total.delta) ** 0.5
            report.kept_with_residual = (total.along + self.returned) / total.delta

    def residual_adapter(self) -> Adapter:
        """The adapter that holds what rounding lost, to be used on the merged model."""
        ranks = {site: _rank_of(own) for site, own in self.factors.items()}
        top = max(ranks.values(), default=1)
        patterns = {site: rank for site, rank in ranks.items() if rank != top}
        method = LoRA(
            r=top,
            lora_alpha=top,
            rank_pattern=patterns,
            alpha_pattern={site: float(rank) for site, rank in patterns.items()},
            target_modules=tuple(self.factors),
        )
        kinds = {site: self.base.sites[site].kind for site in self.factors}
        return Adapter("residual", method, self.factors, kinds)

    def _merge(self, piece: Piece, stored: Tensor, target: torch.dtype) -> Tensor:
        check_float(piece.key, stored)
        weight_OK = as_2d(stored, piece.kind)
        wide = torch.promote_types(stored.dtype, torch.float32)
        merged_OK = torch.empty(weight_OK.shape, dtype=target)
        residual = self.residual > 0 and piece.site in self.base.sites
        lost_OK = torch.empty(weight_OK.shape if residual else (0, 0))
        delta_OK = torch.empty_like(lost_OK)
        figures = Kept()
        generator = torch.Generator().manual_seed(stream_seed(self.seed, piece.key)) if self.stochastic else None
        for start, block in _row_blocks(weight_OK):
            rows = slice(start, start + len(block))
            base = block.to(wide)
            delta = sum((source.rows(base, start) for source in piece.sources), torch.zeros_like(base))
            rounded = _rounded(base + delta, target, generator, piece.site)
            merged_OK[rows] = rounded
            figures.add(base, delta, rounded)
            if residual:
                lost_OK[rows], delta_OK[rows] = base + delta - rounded.to(wide), delta
        left, back = self._keep_residual(piece.site, lost_OK, delta_OK) if residual else (figures.lost, 0.0)
        self.left += left
        self.returned += back
        self.total = self.total + figures
        self.report.sites.append(_site_loss(piece.site, figures, left if residual else None, back))
        return as_stored(merged_OK, piece.kind, stored.shape).contiguous()

    def _keep_residual(self, site: str, lost_OK: Tensor, delta_OK: Tensor) -> tuple[float, float]:
        """Keep the best rank-R part of what was lost: (the square that is left of it, its inner product with the change)."""
        u, s, vt = dense_svd(lost_OK, self.residual, self.seed)
        root = s.clamp_min(0).sqrt()
        a, b = (root.unsqueeze(1) * vt).float(), (u * root).float()
        geometry = self.base.sites[site].geometry
        rank = a.shape[0]
        names = LoRA().tensor_names(geometry.kind)
        shapes = (geometry.shape_a(rank), geometry.shape_b(rank))
        self.factors[site] = {
            name: value.reshape(shape).contiguous() for name, value, shape in zip(names, (a, b), shapes, strict=True)
        }
        left = max(0.0, float(lost_OK.double().square().sum() - s.square().sum()))
        back = float(((delta_OK @ a.T) * b).double().sum())
        return left, back


def _rounded(exact: Tensor, target: torch.dtype, generator: torch.Generator | None, site: str) -> Tensor:
    if not bool(torch.isfinite(exact).all()):
        raise ComposeError(f"{site}: the merged weight holds values that are not finite")
    rounded = round_to(exact, target, generator)
    if not bool(torch.isfinite(rounded).all()):
        raise ComposeError(f"{site}: the merged weight does not fit the range of {target}; merge to float32")
    return rounded


def _site_loss(site: str, figures: Kept, left: float | None, back: float) -> SiteLoss:
    loss = SiteLoss(site, figures.ratio, figures.error, figures.kept, figures.unchanged)
    if left is None or not figures.delta:
        return loss
    return replace(loss, left=(left / figures.delta) ** 0.5, kept_with_residual=(figures.along + back) / figures.delta)


def _row_blocks(weight_OK: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _ELEMENTS_AT_ONCE // max(1, weight_OK.shape[1]))
    for start in range(0, weight_OK.shape[0], step):
        yield start, weight_OK[start : start + step]


def _config(base: Skeleton, plan: Plan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config with the new dtype, and untied where weights came apart."""
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
                    part[name] = _dtype_name(dtype)
    return config


def _refuse_rounding(report: MergeReport) -> None:
    kept = report.kept if report.kept_with_residual is None else max(report.kept, report.kept_with_residual)
    if kept >= LEAST_KEPT:
        return
    worst = min(report.sites, key=lambda site: site.kept)
    raise ComposeError(
        f"this merge would round the fine-tune away: its change is {report.ratio:.2g} of the weights, and only {kept:.0%} of it would be "
        f"kept (least at {worst.site}: {worst.kept:.0%}); merge to --dtype float32, add --residual 16, take --rounding stochastic, or "
        "say --allow-rounding"
    )


def _rank_of(own: Mapping[str, Tensor]) -> int:
    return int(next(iter(own.values())).shape[0])


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "as stored" if dtype is None else str(dtype).removeprefix("torch.")
