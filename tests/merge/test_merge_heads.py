"""Merging adapters that brought a head: a folder that transformers loads as its class with this head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import tiny
from tests.training.made import QUIET, SIZES
from tests.training.test_classification import ENCODER, chosen, framed_tokenizer, rows, write
from torch import Tensor

import veneer
from veneer.cli.main import main
from veneer.models.load import load_base
from veneer.training import train

IDS = torch.arange(3, 20).reshape(1, -1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder saved without a head and without a prefix, and rows of three classes and of numbers."""
    folder = tmp_path_factory.mktemp("heads")
    tiny(ENCODER, **SIZES).base_model.save_pretrained(folder / "base")
    framed_tokenizer().save_pretrained(folder / "base")
    write(folder / "train.jsonl", rows(12, ("low", "mid", "top")))
    write(folder / "numbers.jsonl", rows(12, (0.5, 2.0, 3.5)))
    return folder


def trained(place: Path, out: Path, **others: object) -> Path:
    """The adapter of a run of two steps."""
    adapter: Path = train(chosen(place, out, steps=2, **others), console=QUIET).adapter
    return adapter


def adapted(place: Path, task: str, mix: dict[Path, float]) -> Tensor:
    """Logits of the base with a mix of adapters."""
    bank = veneer.attach(load_base(place / "base", dtype="float32", task=task).model)
    route = {bank.load(folder, name=f"a{number}").name: weight for number, (folder, weight) in enumerate(mix.items())}
    with bank.use(route), torch.no_grad():
        return bank.model(input_ids=IDS).logits


def test_a_classifier_merges_with_its_head(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' own class loads the folder with the names of the classes, and computes the adapter's logits; two runs may be mixed."""
    from transformers import AutoModelForSequenceClassification

    two = (write(tmp_path / "two.jsonl", rows(12)),)
    one, other = (trained(place, tmp_path / f"run{seed}", seed=seed, data=two) for seed in (0, 1))
    three = {trained(place, tmp_path / "three"): 1.0}
    for number, (mix, classes) in enumerate(((three, ("low", "mid", "top")), ({one: 0.7, other: 0.5}, ("no", "yes")))):
        out = tmp_path / f"out{number}"
        words = [f"{folder}:{weight}" for folder, weight in mix.items()]
        assert main(["merge", *words, "--base", str(place / "base"), "--out", str(out)]) == 0
        assert "transformers loads it as BertForSequenceClassification" in capsys.readouterr().out
        model = AutoModelForSequenceClassification.from_pretrained(out).eval()
        assert model.config.id2label == dict(enumerate(classes))
        wanted = adapted(place, "classification", mix)
        assert wanted.shape == (1, len(classes)) and torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-6)


def test_a_head_for_numbers_merges_and_tasks_do_not_mix(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A regression keeps its one output; adapters of two tasks, or of other classes, are refused."""
    from transformers import AutoModelForSequenceClassification

    numbers = trained(place, tmp_path / "numbers", task="regression", data=(place / "numbers.jsonl",))
    classes = trained(place, tmp_path / "classes")
    base = ["--base", str(place / "base"), "--out"]
    assert main(["merge", str(numbers), *base, str(tmp_path / "out")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.problem_type == "regression"
    assert torch.allclose(model(input_ids=IDS).logits, adapted(place, "regression", {numbers: 1.0}), atol=1e-6)
    assert main(["merge", f"{numbers}:1", f"{classes}:1", *base, str(tmp_path / "no")]) == 1
    assert "adapters of different tasks cannot be merged together" in capsys.readouterr().err
    others = write(tmp_path / "others.jsonl", rows(12, ("a", "b", "c")))
    more = trained(place, tmp_path / "more", data=(others,))
    assert main(["merge", f"{more}:1", f"{classes}:1", *base, str(tmp_path / "no")]) == 1
    assert "heads for different classes cannot be merged together" in capsys.readouterr().err
