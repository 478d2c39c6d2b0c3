"""Directions and magnitudes that training changes: full fine-tuning, LoRA and DoRA (arXiv 2402.09353, section 3).

    python -m evidence.magnitudes runs/whole/seeds/adapters/*

For every adapter and layer: the mean change of the norms of the weight's rows, and of their directions (1 - cosine). The table has their
means over layers and their correlation over layers. The paper finds a negative correlation for full fine-tuning and DoRA, and a positive
one for LoRA.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evidence.records import markdown
from veneer.adapters import Adapter
from veneer.adapters.merge import check_mergeable
from veneer.analysis.spectra import pearson
from veneer.checkpoints import read_adapter
from veneer.checkpoints.base_files import Skeleton, as_2d, base_folder, fit, skeleton_with_head
from veneer.checkpoints.locate import task_of_adapter
from veneer.checkpoints.receipt import labels_of
from veneer.errors import VeneerError
from veneer.models.classifiers.heads import belongs_to_head

Changes = dict[str, tuple[float, float]]
"""(direction, magnitude) by site."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path, help="adapters of classifiers, NAME-seedN")
    parser.add_argument("--base", default="minilm-l6")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Changes]] = {}
    for folder in args.adapters:
        adapter = read_adapter(folder)
        if not mergeable(adapter):
            continue  # no change of a weight, such as a prefix
        base = skeleton_with_head(base_folder(args.base), task_of_adapter(folder), labels_of(adapter))
        if len(changes := changes_of(fit(adapter, base), base)) > 2:  # fewer have no correlation: a head alone
            found.setdefault(folder.name.partition("-seed")[0], []).append(changes)
    print(table(found))


def mergeable(adapter: Adapter) -> bool:
    """True if the adapter is a change of weights."""
    try:
        check_mergeable(adapter)
    except VeneerError:
        return False
    return True


def changes_of(adapter: Adapter, base: Skeleton) -> Changes:
    """The changes at every layer outside the head."""
    own = [name for name, values in adapter.overrides.items() if "weight" in values and name in base.sites]
    found = {}
    for name in (*adapter.tensors, *own):
        if belongs_to_head(base.model, f"{name}.weight"):
            continue
        weight_OK = base.weight_2d(name).float()
        if name in adapter.tensors:
            tensors = {key: value.detach().float() for key, value in adapter.tensors[name].items()}
            trained_OK = weight_OK + adapter.method.delta(tensors, adapter.scale(name), weight_OK)
        else:
            trained_OK = as_2d(adapter.overrides[name]["weight"].detach().float(), base.sites[name].kind)
        found[name] = change(weight_OK, trained_OK)
    return found


def change(weight_OK: Tensor, trained_OK: Tensor) -> tuple[float, float]:
    """Means over outputs of 1 - cos(W'_o, W_o), and of | ||W'_o|| - ||W_o|| |."""
    one, other = weight_OK.double(), trained_OK.double()
    direction = 1 - torch.cosine_similarity(one, other, dim=1)
    return float(direction.mean()), float((other.norm(dim=1) - one.norm(dim=1)).abs().mean())


def table(found: dict[str, list[Changes]]) -> str:
    """One row per method, with the smallest and the largest correlation of its runs."""
    rows = []
    for label, runs in found.items():
        direction, magnitude = (
            statistics.fmean(pair[part] for run in runs for pair in run.values()) for part in (0, 1)
        )
        cells = [spread([correlation(run, kind) for run in runs]) for kind in ("", "query")]
        rows.append([label, str(len(runs)), f"{direction:.2e}", f"{magnitude:.2e}", *cells])
    header = ["method", "runs", "change of direction", "of magnitude", "correlation (least to most)", "of query layers"]
    return markdown(header, rows)


def correlation(run: Changes, kind: str) -> float:
    """Pearson's correlation of direction and magnitude over the layers whose names end so."""
    chosen = [pair for name, pair in run.items() if name.endswith(kind)]
    return (pearson(*zip(*chosen, strict=True)) if len(chosen) > 2 else None) or math.nan


def spread(values: Sequence[float]) -> str:
    """Mean, least and most."""
    return f"{statistics.fmean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


if __name__ == "__main__":
    main()
