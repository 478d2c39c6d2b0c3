"""Directions and magnitudes that training changes: full fine-tuning, LoRA and DoRA (arXiv 2402.09353, section 3).

    python -m evidence.magnitudes runs/whole/seeds/adapters/*

For every adapter and site: the mean change of the norms of the weight's rows, and of their directions (1 - cosine), as ``veneer inspect
--spectra`` computes them. The table has their means over sites and their correlation over sites. The paper finds a negative correlation
for full fine-tuning and DoRA, and a positive one for LoRA.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from evidence.records import markdown
from veneer.adapters.methods import has_option
from veneer.analysis.spectra import AdapterSpectra, adapter_spectra
from veneer.checkpoints import read_adapter
from veneer.checkpoints.base_files import base_folder, fit, skeleton_with_head
from veneer.checkpoints.locate import task_of_adapter
from veneer.checkpoints.receipt import labels_of


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path, help="adapters of classifiers, of one method and others")
    parser.add_argument("--base", default="minilm-l6")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[AdapterSpectra]] = {}
    for folder in args.adapters:
        adapter = read_adapter(folder)
        base = skeleton_with_head(base_folder(args.base), task_of_adapter(folder), labels_of(adapter))
        rank = f" r={adapter.method.r}" if has_option(adapter.method.name, "r") else ""  # type: ignore[attr-defined]
        spectra = adapter_spectra(fit(adapter, base), base.weight_2d)
        found.setdefault(f"{adapter.method.name}{rank}", []).append(spectra)
    print(table(found))


def table(found: dict[str, list[AdapterSpectra]]) -> str:
    """One row per method, with the smallest and the largest correlation of its runs."""
    rows = []
    for label, runs in found.items():
        sites = [site for run in runs for site in run.sites]
        changes = [
            statistics.fmean(value for site in sites if (value := getattr(site, key)) is not None)
            for key in ("direction_change", "magnitude_change")
        ]
        correlations = [run.correlation for run in runs if run.correlation is not None]
        spread = [statistics.fmean(correlations), min(correlations), max(correlations)]
        cells = [f"{changes[0]:.2e}", f"{changes[1]:.2e}", "{:+.2f} ({:+.2f} to {:+.2f})".format(*spread)]
        rows.append([label, str(len(runs)), *cells])
    return markdown(["method", "runs", "change of direction", "of magnitude", "correlation (least, most)"], rows)


if __name__ == "__main__":
    main()
