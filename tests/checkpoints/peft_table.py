"""The table of ``docs/peft.md``: what PEFT makes of a folder with an adapter on each architecture, tried with PEFT itself.

    python -m tests.checkpoints.peft_table      # writes the table into the page

A row is the outcome of `trial` with the sites of ``all-linear`` that PEFT reads: whether it computes the same logits from the folder. The
other sites are named with the reason.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tests.checkpoints.architectures import ARCHITECTURES, MULTIMODAL, build, logits
from tests.checkpoints.helpers import load_peft
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.adapters import Method

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = "| architecture | layers that PEFT reads | LoRA | DoRA | layers that it does not read |\n|---|---|---|---|---|\n"
METHODS: dict[str, Method] = {
    "LoRA": LoRA(r=3, lora_alpha=6),
    "DoRA": DoRA(r=3, lora_alpha=6),
}


def trial(model: nn.Module, method: Method, folder: Path) -> tuple[float, float, list[str]]:
    """(distance of PEFT's logits from ours, effect of the adapter, notes of our own reading) of a random adapter, written and read back."""
    twins = copy.deepcopy(model), copy.deepcopy(model)
    plain = logits(model)
    bank = veneer.attach(model)
    adapter = bank.add("a", method)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    with bank.use("a"):
        ours = logits(model)
    bank.save("a", folder)
    bank.detach()
    again = veneer.attach(twins[0])
    notes: list[str] = again.load(folder, name="b").meta["notes"]
    with again.use("b"):
        assert (logits(twins[0]) - ours).abs().max() <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits(load_peft(twins[1], folder))
    return float((theirs - ours).abs().max()), float((ours - plain).abs().max()), notes


def row(name: str) -> str:
    """The row of an architecture. Raises AssertionError where PEFT or Veneer reads another change than was written."""
    model = build(name)
    bank = veneer.attach(model)
    read: dict[str, str] = {}
    left: dict[str, str] = {}
    tried: dict[str, Method] = {}
    for label, method in METHODS.items():
        lost, every = bank.not_portable(method), method.choose(bank.survey)
        sites = [site for site in every if site not in lost]
        read[label] = _counted(sites)
        left[label] = "; ".join(f"{_counted(sites)}: {reason}" for reason, sites in by_reason(every, lost).items())
        targets = tuple(sites) if any(bank.sites[site].stack for site in every if site in lost) else "all-linear"
        tried[label] = method.model_copy(update={"target_modules": targets})
    bank.detach()
    for method in tried.values():
        with tempfile.TemporaryDirectory() as folder:
            distance, effect, notes = trial(copy.deepcopy(model), method, Path(folder))
        assert effect > 1e-3, f"{name}: the adapter has no effect"
        assert distance <= 1e-4 * max(1.0, effect), f"{name}: PEFT's logits differ by {distance:.2g}"
        assert not any("file's layers" in note for note in notes), f"{name}: {notes}"
    same = left["LoRA"] == left["DoRA"]
    said = left["LoRA"] if same else "; ".join(f"{label}: {text}" for label, text in left.items() if text)
    return f"| {name} ({type(model).__name__}) | {read['LoRA']} | yes | yes | {said} |"


def by_reason(sites: Iterable[str], lost: Mapping[str, str]) -> dict[str, list[str]]:
    """The sites that PEFT cannot read, by the reason."""
    found: dict[str, list[str]] = {}
    for site in sites:
        if site in lost:
            found.setdefault(lost[site], []).append(site)
    return found


def _counted(sites: Iterable[str]) -> str:
    counts = Counter(site.rpartition(".")[2] for site in sites)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def rows_of_page() -> dict[str, str]:
    """{architecture: row} of the page."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    rows = rest.partition(END)[0].splitlines()[2:]
    return {re.split(r"[| ]+", line)[1]: line for line in rows if line.startswith("|")}


def write() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    table = HEAD + "".join(f"{row(name)}\n" for name in ARCHITECTURES)
    PAGE.write_text(before + START + table + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"{len(ARCHITECTURES)} architectures, {len(MULTIMODAL)} of them multimodal")
