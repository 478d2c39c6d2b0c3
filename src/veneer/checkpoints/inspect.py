"""The content of an adapter folder, its origin, and what is unusual about it.

Without a base: method, sites, ranks, scales, sizes, the norm of the change at each site, the receipt. The norm is ||s B A||_F (for DoRA the
part of the direction), from the Gram matrices of the factors, so no matrix of size out x in is formed.

    ||B A||_F^2 = tr((B^T B)(A A^T))

With a base the loader has checked the folder (`read_adapter_folder`), and the change is given as a share of ||W||_F too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.adapters.bank import Bank
from veneer.adapters.methods import factors_2d
from veneer.adapters.overrides import ROWS, WEIGHT
from veneer.checkpoints.base_view import BaseView, base_view
from veneer.checkpoints.findings import listed
from veneer.checkpoints.receipt import Receipt

_EXPERT = re.compile(r"\bexperts\.\d+\b")
_BLOCK = re.compile(r"\.\d+\.")

_EXPERT = re.compile(r"\bexperts\.\d+\b")


@dataclass(frozen=True)
class SiteView:
    """One site. norm: ||s B A||_F, else `Method.moved`. share: norm / ||W||_F, with a base. magnitude: least, mean, greatest."""

    name: str
    kind: str
    rank: int
    alpha: float
    scale: float
    in_: int
    out: int
    parameters: int
    norm: float
    share: float | None = None
    magnitude: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class OverrideView:
    """An overridden weight, bias or rows. moved: ||W' - W||_F / ||W||_F, with a base."""

    place: str
    name: str
    shape: tuple[int, ...]
    tokens: int | None = None
    moved: float | None = None


@dataclass
class View:
    """The content of an adapter folder."""

    path: str
    method: str
    base: str | None
    parameters: int
    bytes: int
    sites: list[SiteView]
    options: dict[str, Any]
    receipt: Receipt | None
    own: list[OverrideView] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unusual: list[str] = field(default_factory=list)
    against: str | None = None
    logits: dict[str, Any] | None = None

    def groups(self) -> dict[str, list[SiteView]]:
        """Sites by the last part of their name: q_proj, v_proj, ..."""
        found: dict[str, list[SiteView]] = {}
        for site in self.sites:
            found.setdefault(site.name.rpartition(".")[2] or "the model itself", []).append(site)
        return found


def view(adapter: Adapter, bank: Bank | None = None) -> View:
    """Describe an adapter that was read with `read_adapter`, or with the ``load`` of a bank, which is then given."""
    path, base = Path(adapter.meta.get("path", ".")), base_view(bank)
    sites = [_site(adapter, name, base) for name in adapter.tensors]
    settings = adapter.meta.get("settings") or {}
    options = {
        key: value
        for key, value in adapter.method.model_dump().items()
        if value != type(adapter.method).model_fields[key].get_default(call_default_factory=True)
        and key not in ("target_modules", "r", "lora_alpha")
    }
    found = View(
        str(path),
        adapter.method.label,
        settings.get("base_model_name_or_path"),
        adapter.num_parameters(),
        sum(file.stat().st_size for file in path.glob("adapter_*") if file.is_file()),
        sites,
        {**{key: value for key, value in adapter.method.model_dump().items() if key in ("r", "lora_alpha")}, **options},
        adapter.meta.get("receipt"),
        [_override(adapter, layer, key, base) for layer, keys in adapter.overrides.items() for key in keys],
        list(adapter.meta.get("notes", ())),
    )
    found.unusual = list(unusual(sites))
    return found


def unusual(sites: list[SiteView]) -> list[str]:
    """Findings that are rare after training and matter for a downloaded adapter."""
    findings: list[str] = []
    wide = [site.name for site in sites if site.rank > min(site.in_, site.out)]
    if wide:
        findings.append(
            f"the rank is greater than the layer's own sizes at {listed(wide)}: more parameters than the change can use"
        )
    strong = [site.name for site in sites if site.scale > 16]
    if strong:
        findings.append(
            f"the change is scaled by {max(site.scale for site in sites):g} (lora_alpha over the rank) at {listed(strong)}"
        )
    zero = [site.name for site in sites if site.norm == 0]
    moving = [site for site in sites if site.norm > 0]
    if zero and moving:
        findings.append(f"the change is zero at {listed(zero)}")
    # The experts of one block count once, and so do layers of one name in it, such as BERT's dense.
    places = {_EXPERT.sub("experts.*", site.name) for site in sites}
    blocks = {((number := _BLOCK.search(name)) and name[: number.end()], name.rpartition(".")[2]) for name in places}
    by_name = Counter(last for block, last in blocks if block is not None)
    if len(set(by_name.values())) > 1 and max(by_name.values()) > 2:
        most = max(by_name.values())
        rare = [
            f"{name} ({count} of {most})" for name, count in by_name.items() if count < most / 2 and name and count > 1
        ]
        if rare:
            findings.append(f"some layers are adapted in fewer blocks than others: {', '.join(rare)}")
    if len(moving) >= 4:
        middle = median(site.norm for site in moving)
        loud = [
            f"{site.name} ({site.norm / middle:.0f} times the median)" for site in moving if site.norm > 20 * middle
        ]
        if loud:
            findings.append(f"the change is far larger than elsewhere at {listed(loud)}")
    large = [f"{site.name} ({site.share:.0%})" for site in sites if site.share is not None and site.share > 0.5]
    if large:
        findings.append(f"the change is large beside the base's own weight at {listed(large)}")
    return findings


def _override(adapter: Adapter, layer: str, key: str, base: BaseView) -> OverrideView:
    value = adapter.overrides[layer][key].detach()
    tokens = adapter.tokens.get(layer) if key == ROWS else None
    moved, before = None, base.parameters_of(layer).get(WEIGHT if key == ROWS else key)
    if before is not None:
        then = (before if tokens is None else before[list(tokens)]).detach().to(value)
        moved = float((value - then).norm() / then.norm().clamp_min(1e-12))
    return OverrideView(layer, key, tuple(value.shape), None if tokens is None else len(tokens), moved)


def _site(adapter: Adapter, name: str, base: BaseView) -> SiteView:
    tensors: dict[str, Tensor] = {key: value.detach() for key, value in adapter.tensors[name].items()}
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    told = base.geometry(name, adapter.method.geometry(adapter.kinds[name], shapes))
    norm = adapter.method.moved(tensors)
    if adapter.method.low_rank:
        a_RK, b_OR = factors_2d(tensors, torch.float64)
        norm = adapter.scale(name) * math.sqrt(max(0.0, float(((b_OR.T @ b_OR) * (a_RK @ a_RK.T)).sum())))
    share = None
    if name in base.sites and adapter.method.low_rank:
        size = float(base.sites[name].squared_norms().sum().sqrt())
        share = norm / size if size > 0 else None
    magnitude = adapter.method.magnitude(tensors)
    return SiteView(
        name,
        adapter.kinds[name],
        adapter.rank(name),
        adapter.alpha(name),
        adapter.scale(name),
        told.fan_in,
        told.out,
        sum(value.numel() for value in tensors.values()),
        norm,
        share,
        None if magnitude is None else (float(magnitude.min()), float(magnitude.mean()), float(magnitude.max())),
    )
