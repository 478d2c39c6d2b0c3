"""Merging into a folder: W' = W + sum_j w_j (W'_j - W) for every adapted weight, shard by shard, with the rounding error.

The base is read and written tensor by tensor; a weight is computed in fp32 (or wider) from the stored one, a block of rows at a time, and
rounded once (then quantized, where that is asked for), so a base larger than memory can be merged. The effect of rounding on the delta is
measured on the written numbers (`rounding.py`), and a merge that would lose the fine-tune to rounding is refused unless it is allowed.

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
from veneer.checkpoints.dequantized_folder import QuantizedReading, dtype_of
from veneer.checkpoints.model_folder import SHARD_BYTES, ModelWriter, write_model
from veneer.checkpoints.peft.portable import as_parameters
from veneer.checkpoints.quantized_folder import put_quantized, quantizable
from veneer.checkpoints.tensors import dtype_name
from veneer.deltas.build import Tensors, assemble, site_tensors
from veneer.deltas.delta import SiteDelta
from veneer.deltas.linalg import dense_svd
from veneer.deltas.svd import from_svd
from veneer.errors import ComposeError
from veneer.kernels.quantized.state import quantize
from veneer.kernels.quantized.weight import QuantizedWeight
from veneer.merge.plan import MergedTensor, MergePlan, Mix, plan_merge
from veneer.merge.rounding import RoundingTotals, round_to
from veneer.models.quantized.scheme import Scheme

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
    format: str | None = None
    """The quantized format of the linear layers, if they have one."""
    sites: list[SiteLoss] = field(default_factory=list)
    error: float = 0.0
    kept: float = 1.0
    ratio: float = 0.0
    distance: float = 0.0
    """Difference of the stored adapted weights from the exact ones, as a share of their norm."""
    left: float | None = None
    kept_with_residual: float | None = None
    untied: list[list[str]] = field(default_factory=list)
    head: str | None = None
    """The class of the model, where adapters brought their head."""
    logits: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def merge_to_folder(
    mix: Mix,
    base: Skeleton,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    scheme: Scheme | None = None,
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
        scheme: the format to which linear layers are quantized; None writes plain weights.
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
    untied, format = [list(group) for group in plan.untied], None if scheme is None else scheme.format
    report = MergeReport(str(out), named, rounding, parents, format, untied=untied)
    report.head = type(base.model).__name__ if base.task else None
    merger = _Merger(base, plan, dtype, scheme, rounding, seed, residual, report)
    if scheme is not None and not merger.layers:
        raise ComposeError(f"{base.folder.path} has no linear layer that can be quantized; leave --to out")

    def finished(folder: Path) -> None:
        report.notes += _notes(base, scheme)
        if merger.factors and write_residual is not None:
            sites = {site: base.sites[site] for site in merger.factors}
            parameters = [f"{site}.weight" for site in as_parameters(base.model, sites)]
            write_residual(
                assemble(merger.factors, merger.kinds, "residual", parameters=parameters), folder / "residual"
            )
        if check is not None:
            check(folder, report)
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    with write_model(
        base.folder, out, _config(base, plan, dtype, scheme), shard_bytes=shard_bytes, check=finished
    ) as writer:
        merger.write(writer)
        if not allow_rounding:
            _refuse_rounding(report, base)
    return report


class _SiteRounding:
    """The rounding of one weight, block by block, and with ``kept`` the error and the delta themselves."""

    def __init__(self, shape: torch.Size, *, kept: bool) -> None:
        self.totals = RoundingTotals()
        self.kept = kept
        self.lost_OK = torch.empty(shape if kept else (0, 0))
        self.delta_OK = torch.empty_like(self.lost_OK)

    def add(self, rows: slice, base: Tensor, delta: Tensor, stored: Tensor, exact: Tensor) -> None:
        """Add some rows; the arguments are those of `RoundingTotals.add`."""
        self.totals.add(base, delta, stored, exact)
        if self.kept:
            self.lost_OK[rows], self.delta_OK[rows] = exact - stored.to(exact.dtype), delta


@dataclass
class _Merger:
    """The state of one merge: totals over sites and the factors of the residual."""

    base: Skeleton
    plan: MergePlan
    dtype: torch.dtype | None
    scheme: Scheme | None
    rounding: str
    seed: int
    residual: int
    report: MergeReport
    total: RoundingTotals = field(default_factory=RoundingTotals)
    factors: dict[str, Tensors] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = {} if self.scheme is None else quantizable(self.base, self.scheme)
        """{name in the files: its layer} of the weights to quantize."""

    def write(self, writer: ModelWriter) -> None:
        """Write every tensor of the new model, in the order of the base's files."""
        for key, tensor in self.base.folder.tensors():
            if key in self.plan.replaced:
                continue
            target = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            for planned in self.plan.tensors.get(key, (MergedTensor(key, ""),)):
                merged: Tensor | QuantizedWeight = tensor.to(target)
                if planned.experts:
                    merged = self._merge_experts(planned, tensor, target)
                elif planned.changes:
                    merged = self._merge(planned, tensor, target)
                elif planned.key in self.layers:
                    merged = self._quantized(key, tensor, target)
                if isinstance(merged, QuantizedWeight):
                    put_quantized(writer, planned.key, merged)
                    continue
                # a second name for an unchanged tensor needs memory of its own to be stored
                writer.put(planned.key, merged.clone() if planned.key != key and merged is tensor else merged)
        report, total = self.report, self.total
        report.error, report.kept, report.ratio, report.distance = total.error, total.kept, total.ratio, total.distance
        if self.residual and total.delta:
            report.left, report.kept_with_residual = total.left, total.kept_with_residual

    def _merge_experts(self, planned: MergedTensor, stored: Tensor, target: torch.dtype) -> Tensor:
        """A stack of experts with the changes of its sites, one expert after the other."""
        check_float(planned.key, stored)
        merged = stored.to(target, copy=True)
        for site, changes in planned.experts.items():
            one = replace(planned, key=site, site=site, kind="linear", changes=changes)
            weight = self._merge(one, self.base.view_of(site, stored), target)
            assert isinstance(weight, Tensor)
            self.base.view_of(site, merged).copy_(weight)
        return merged

    def _merge(self, planned: MergedTensor, stored: Tensor, target: torch.dtype) -> Tensor | QuantizedWeight:
        check_float(planned.key, stored)
        weight_OK = as_2d(stored, planned.kind)
        merged_OK = torch.empty(weight_OK.shape, dtype=target)
        loss = _SiteRounding(weight_OK.shape, kept=self.residual > 0 and planned.site in self.base.sites)
        stochastic = self.rounding == "stochastic"
        generator = torch.Generator().manual_seed(stream_seed(self.seed, planned.key)) if stochastic else None
        quantized = planned.key in self.layers
        for rows, base, delta, exact in _row_blocks(weight_OK, planned):
            merged_OK[rows] = _rounded(exact, target, generator, planned.site)
            if not quantized:
                loss.add(rows, base, delta, merged_OK[rows], exact)
        found: Tensor | QuantizedWeight = as_stored(merged_OK, planned.kind, stored.shape).contiguous()
        if quantized:
            found, own = self._quantize(merged_OK), self._quantized(planned.key, stored, target)
            for rows, base, delta, exact in _row_blocks(weight_OK, planned):
                held = found.dequantize(rows, base.dtype)
                loss.add(rows, own.dequantize(rows, base.dtype), delta, held, exact)
        self._record(planned.site, loss)
        return found

    def _quantized(self, key: str, stored: Tensor, target: torch.dtype) -> QuantizedWeight:
        """A weight of the base in the format; as it is held there, if it is already."""
        assert self.scheme is not None
        known = self.base.folder.quantized(key) if self.base.folder.format(key) == self.scheme.format else None
        return self._quantize(stored.to(target)) if known is None else known

    def _quantize(self, weight_OK: Tensor) -> QuantizedWeight:
        assert self.scheme is not None
        return quantize(weight_OK, self.scheme.format, double=self.scheme.double)

    def _record(self, site: str, loss: _SiteRounding) -> None:
        """Add a site to the report, and keep its residual."""
        totals = loss.totals
        totals.remaining = totals.lost
        if loss.kept:
            totals.remaining, totals.returned = self._keep_residual(site, loss.lost_OK, loss.delta_OK)
        self.total = self.total + totals
        with_residual = (totals.left, totals.kept_with_residual) if loss.kept and totals.delta else ()
        self.report.sites.append(
            SiteLoss(site, totals.ratio, totals.error, totals.kept, totals.unchanged, *with_residual)
        )

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


def _row_blocks(weight_OK: Tensor, planned: MergedTensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Blocks of rows: (which, the base weight, its change, the exact merged weight), in fp32 or wider."""
    step = max(1, _ELEMENTS_AT_ONCE // max(1, weight_OK.shape[1]))
    for start in range(0, weight_OK.shape[0], step):
        base = weight_OK[start : start + step].to(torch.promote_types(weight_OK.dtype, torch.float32))
        delta = sum((change.rows(base, start) for change in planned.changes), torch.zeros_like(base))
        only = planned.changes[0].value if len(planned.changes) == 1 else None
        exact = base + delta if only is None else only(start, start + len(base)).to(base)
        yield slice(start, start + len(base)), base, delta, exact


def _notes(base: Skeleton, scheme: Scheme | None) -> list[str]:
    notes = []
    if isinstance(base.folder, QuantizedReading):
        notes.append(
            f"the base is {base.folder.path} in {base.folder.scheme.format}, whose weights differ from the plain ones by "
            f"{base.folder.error:.1%} of their norm; --quantize none merges into the plain ones"
        )
    if scheme is not None and base.survey.stacks:
        notes.append("the stacked experts are not quantized, because transformers reads quantized linear layers only")
    return notes


def _config(base: Skeleton, plan: MergePlan, dtype: torch.dtype | None, scheme: Scheme | None) -> dict[str, Any]:
    """The base's config with the new dtype and format, and untied where weights are no longer shared."""
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
    if scheme is not None:
        config["quantization_config"] = scheme.as_config(dtype or dtype_of(base.folder.config))
    return config


def _refuse_rounding(report: MergeReport, base: Skeleton) -> None:
    kept = report.kept if report.kept_with_residual is None else max(report.kept, report.kept_with_residual)
    if kept >= LEAST_KEPT:
        return
    worst = min(report.sites, key=lambda site: site.kept)
    remedies = ["merge to --dtype float32", "add --residual 16", "use --rounding stochastic"]
    if report.format is not None:
        plain = (
            ["merge into the plain weights with --quantize none"] if isinstance(base.folder, QuantizedReading) else []
        )
        remedies = [f"leave --to {report.format} out", *plain, "add --residual 16"]
    raise ComposeError(
        f"this merge would round the fine-tune away: its change is {report.ratio:.2g} of the weights, and only {kept:.0%} of it would be "
        f"kept (least at {worst.site}: {worst.kept:.0%}); {', '.join(remedies)}, or give --allow-rounding"
    )
