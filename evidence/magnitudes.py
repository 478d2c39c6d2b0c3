"""Directions and magnitudes that training changes: full fine-tuning, LoRA and DoRA (arXiv 2402.09353, section 3).

    python -m evidence.magnitudes runs/whole/seeds/adapters/*

For every adapter and layer: the mean change of the norms of the weight's rows, and of their directions (1 - cosine). The table has their
means over layers and their correlation over layers. The paper finds a negative correlation for full fine-tuning and DoRA, and a positive
one for LoRA.
"""

from __future__ import annotations

import argparse
import statistics
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

Changes = list[tuple[float, float]]
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
    found = []
    for name in (*adapter.tensors, *own):
        if belongs_to_head(base.model, f"{name}.weight"):
            continue
        weight_OK = base.weight_2d(name).float()
        if name in adapter.tensors:
            tensors = {key: value.detach().float() for key, value in adapter.tensors[name].items()}
            trained_OK = weight_OK + adapter.method.delta(tensors, adapter.scale(name), weight_OK)
        else:
            trained_OK = as_2d(adapter.overrides[name]["weight"].detach().float(), base.sites[name].kind)
        found.append(change(weight_OK, trained_OK))
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
        direction, magnitude = (statistics.fmean(site[part] for run in runs for site in run) for part in (0, 1))
        correlations = [pearson(*zip(*run, strict=True)) or 0.0 for run in runs]
        spread = f"{statistics.fmean(correlations):+.2f} ({min(correlations):+.2f} to {max(correlations):+.2f})"
        rows.append([label, str(len(runs)), f"{direction:.2e}", f"{magnitude:.2e}", spread])
    return markdown(["method", "runs", "change of direction", "of magnitude", "correlation (least to most)"], rows)


if __name__ == "__main__":
    main()
