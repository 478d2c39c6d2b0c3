"""``veneer compare``: learning rates are searched, winners run with every seed, and all are measured on rows of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import SIZES, World, examples, write_place, write_rows

from veneer.adapters import METHODS
from veneer.cli.main import main
from veneer.config import TrainOptions
from veneer.data.example import Example
from veneer.errors import BaseModelError, ConfigError, TrainingError
from veneer.training.compare import measure, study
from veneer.training.compare.measure import ContestantRow, Score
from veneer.training.compare.report import _counts, _labels, _step, html, notes, plot
from veneer.training.compare.study import Comparison, Contestant
from veneer.training.run import setup
from veneer.training.run.result import JobResult
from veneer.training.tasks import TASKS, task_of

FLAGS = [
    *("compare", "train.jsonl", "--valid", "valid.jsonl", "--test", "test.jsonl", "--base", "base", "--out", "cmp"),
    *("--method", "lora,full", "--r", "2", "--learning-rate", "1e-9,1e-2", "--seed", "0,1"),
    *("--steps", "3", "--batch-size", "2", "--no-plan", "--dtype", "float32", "--json"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, rows for training, for the search and for the test."""
    torch.set_num_threads(1)
    folder = write_place(tmp_path_factory.mktemp("compare"))
    write_rows(folder / "test.jsonl", 7, seed=2)
    return folder


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """A short text to forget, and few repeated measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "general_text", lambda: "The sea is wide. " * 8)
        patch.setattr(measure, "_REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    """The result of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(FLAGS) == 0
    found: dict[str, Any] = json.loads((place / "cmp" / study.RESULT).read_text(encoding="utf-8"))
    return found


def test_the_command_searches_trains_and_measures(place: Path, first: dict[str, Any]) -> None:
    """The rate that learns wins, and both seeds are measured."""
    rows = {row["label"]: row for row in first["rows"]}
    assert set(rows) == {"lora r=2", "full"}
    for row in rows.values():
        assert row["learning_rate"] == 1e-2 and [rate for rate, _ in row["rates"]] == [1e-9, 1e-2]
        assert row["rates"][0][1] > row["rates"][1][1]
        assert row["best"]["mean"] < first["base_loss"] and row["best"]["low"] <= row["best"]["mean"]
        assert row["seeds"] == [0, 1] and row["disk_bytes"] > 0 and row["step_bytes"] >= 8 * row["parameters"]
    assert rows["full"]["parameters"] > rows["lora r=2"]["parameters"] and rows["full"]["r"] is None
    assert [row["label"] for row in first["rows"]] == sorted(rows, key=lambda label: rows[label]["best"]["mean"])
    assert "full" in (place / "cmp" / "compare.html").read_text(encoding="utf-8")


def test_the_same_command_again_trains_nothing(
    place: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It finds the finished runs, and the same scores."""
    metrics = {file: file.read_bytes() for file in (place / "cmp").glob("*/metrics/*.jsonl")}
    assert len(metrics) == 4 + 2
    monkeypatch.chdir(place)
    assert main(FLAGS) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["best"] for row in again["rows"]] == [row["best"] for row in first["rows"]]
    assert {file: file.read_bytes() for file in metrics} == metrics


def test_jobs_are_evaluated_four_times(place: Path, tmp_path: Path) -> None:
    """An evaluation of every tenth of the steps would take longer than the training; what is given stays."""
    given = {"data": (place / "train.jsonl",), "epochs": 2.0, "batch_size": 5}
    assert study._run_options(TrainOptions(**given), tmp_path, [{"name": "a"}]).eval_every == 4  # 15 steps of 37 rows
    assert study._run_options(TrainOptions(**given, eval_every=2), tmp_path, [{"name": "a"}]).eval_every == 2


def test_heads_are_scored_and_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a task that has a head the table has its scores, the head's parameters in a column of their own, and no loss of the base. Rates
    that are too low are followed by higher ones."""
    tiny("bert", **SIZES).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, count in (("train", 16), ("valid", 8), ("test", 10)):
        rows = [{"text": "q" if i % 2 else f"w {i}", "label": "yes" if i % 2 else "no"} for i in range(count)]
        # The test rows lack nothing but the order of the classes: they begin with the other one.
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, reversed(rows) if name == "test" else rows)))
    monkeypatch.chdir(tmp_path)
    words = [word for word in FLAGS if word not in ("--seed", "0,1", "--learning-rate", "1e-9,1e-2", "lora,full")]
    words[words.index("--method") + 1 : words.index("--method") + 1] = ["full,prefix"]
    monkeypatch.setattr(study, "FACTORS", (0.01, 0.03))
    assert main([*words, "--task", "classification", "--steps", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base_loss"] is None and {row["label"] for row in found["rows"]} == {"prefix", "full"}
    for row in found["rows"]:
        assert row["head_parameters"] == 16 * 16 + 16 + 2 * 16 + 2
        assert set(row["scores_best"]) == set(row["scores_last"]) == {"accuracy", "f1", "matthews"}
        rates = [rate for rate, _ in row["rates"]]
        assert row["forgetting"] is None and len(rates) > 2
        assert rates == pytest.approx([rates[0] * 3**number for number in range(len(rates))])
        assert row["learning_rate"] != rates[0] and (row["learning_rate"] != rates[-1] or len(rates) == 5)
    assert max(row["scores_best"]["accuracy"]["mean"] for row in found["rows"]) > 0.8
    assert "accuracy (best)" in (tmp_path / "cmp" / "compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "lora,dora"], "give --test FILE"),
        (["--method", "lora,dora", "--test", "absent.jsonl"], "there is no such file"),
        (["--test", "test.jsonl", "--valid", "valid.jsonl"], "one contestant cannot be compared"),
        (["--method", "lora,dora", "--test", "test.jsonl"], "needs held-out rows"),
    ],
)
def test_incomplete_requests_are_refused(
    place: Path, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison needs two contestants, rows for the search and rows for the test; nothing is written without them."""
    monkeypatch.chdir(place)
    assert main(["compare", "train.jsonl", "--base", "base", "--out", "none", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (place / "none").exists()


def test_the_base_is_loaded_as_the_options_say(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison is of the quantized base on the device, not of a plain one on the CPU."""
    seen: dict[str, Any] = {}

    def load_base(name: str, **given: Any) -> Any:
        seen.update(given)
        raise BaseModelError("enough")

    monkeypatch.setattr(setup, "load_base", load_base)
    options = {"data": (place / "train.jsonl",), "valid_fraction": 0.1, "method": ["lora", "dora"]}
    with pytest.raises(BaseModelError, match="enough"):
        study.compare(TrainOptions(**options, quantize="nf4", device="cuda:1"), place / "test.jsonl", seeds=[0])
    assert seen["quantize"] == "nf4" and seen["device"] == "cuda:1"


def test_the_searched_rates_are_those_of_the_method_and_the_task() -> None:
    """The common method and task count where a contestant has none of its own."""
    base: Any = SimpleNamespace(model=SimpleNamespace(config=None))
    found = {}
    for method, task in (("lora", "sft"), ("full", "sft"), ("full", "dpo")):
        options = TrainOptions(data=("rows.jsonl",), method=method, task=task)
        jobs = study._search_jobs([Contestant("own", {"weight_decay": 0.1})], None, options, 0, base)
        found[method, task] = jobs[1]["learning_rate"]
    assert found["full", "sft"] == pytest.approx(found["lora", "sft"] * METHODS["full"].learning_rate_factor)
    assert found["full", "dpo"] == pytest.approx(found["full", "sft"] * TASKS["dpo"].rate)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"sweep": {"task": ["sft", "dpo"]}}, "task: all contestants share it"),
        ({"jobs": [{"name": "a", "data": "a.jsonl"}, {"name": "b"}]}, "data: all contestants share it"),
        ({"r": [2, 4], "on_top_of": ("old",)}, "on_top_of"),
        ({"r": [2, 4], "halving": True}, "halving"),
        ({"r": [2, 4], "processes": 2}, "processes: a comparison runs in one process"),
        ({"r": [2, 4], "cluster": "auto"}, "cluster: a comparison runs in one process"),
        ({"r": [2, 4], "quantize": "nf4", "calibrate": True}, "calibrate"),
    ],
)
def test_options_that_a_comparison_cannot_take_are_refused(given: dict[str, Any], problem: str) -> None:
    """They are named before the base is loaded."""
    options = TrainOptions(data=("rows.jsonl",), valid=("valid.jsonl",), **given)
    with pytest.raises(ConfigError, match=problem):
        study.compare(options, Path("test.jsonl"), seeds=[0])


def result(name: str, state: str, losses: list[float]) -> JobResult:
    """The result of a job that was evaluated at steps 0, 1, 2, ..."""
    found = tuple(enumerate(losses))
    return JobResult(name, "lora", 2, 1e-3, state, "why", 2, found, Path("last"), Path("best"), {})


def test_a_job_that_failed_or_never_gained_is_not_chosen() -> None:
    """A failed job has no adapter, whatever its loss was before; the loss before the first step is the base's."""
    one = Contestant("a", {})
    jobs = [result("a-rate1", "finished", [2.0, 3.0]), result("a-rate2", "finished", [2.0, 2.5])]
    failed = result("a-rate3", "failed", [2.0, 1.0])
    by_name = {job.name: job for job in [*jobs, failed]}
    assert study._best_rate(one, by_name).name == "a-rate2"
    with pytest.raises(TrainingError, match=r"a-rate3 failed at learning rate .*: why"):
        study._require_finished([jobs[0], failed])


def test_preferences_are_measured_by_their_own_loss() -> None:
    """The base's DPO loss is log 2, and an adapter that has moved has another one."""
    world = World()
    pairs = [Example.of_sequences(examples(6, seed=4)[at : at + 2]) for at in (0, 2, 4)]
    tested = measure.TestSet.of(world.runner, task_of(TrainOptions(data=("a",), task="dpo")), pairs, examples(2))
    assert tested.base_loss == pytest.approx(math.log(2))
    world.job("best")
    loss, scores = measure._scores(world.runner, world.bank, tested)
    assert abs(loss - math.log(2)) > 1e-4 and not scores
    assert measure._step(world.runner, world.bank, tested)[0] > 0


def row(label: str, mean: float, half: float, rate: float) -> ContestantRow:
    """A row with an interval of ``half`` on both sides."""
    score = Score(mean, mean - half, mean + half)
    rates = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}
    return ContestantRow(label, "lora", 4, 1000, rate, rates, [0, 1], score, score, score, 1.0, 1, 1.0, 1)


def test_notes_name_results_that_need_care() -> None:
    """A rate at the edge of the search and overlapping intervals are named; clear results are not."""
    base = Comparison(Path(), "base", 2.0, 1.0, {"test": 3})
    base.rows = [row("a", 1.0, 0.1, 1e-3), row("b", 1.15, 0.1, 1e-2), row("c", 1.5, 0.1, 1e-3)]
    lines = notes(base)
    assert [line for line in lines if "cannot be told apart" in line] == ["a and b cannot be told apart with 2 seeds"]
    assert [line.split(":")[0] for line in lines if "edge of the search" in line] == ["b"]
    assert html(base).count("<circle") == 3 and "width=device-width" in html(base)


def test_a_head_alone_stands_left_of_all_others() -> None:
    """It has no parameters of its own, which a logarithmic axis has no place for."""
    alone = replace(row("head only", 2.0, 0.1, 1e-3), parameters=0)
    others = [row("small", 1.0, 0.1, 1e-3), replace(row("large", 1.0, 0.1, 1e-3), parameters=10**6)]
    drawn = plot([alone, *others], None)
    assert sum(f">{label}<" in drawn for label in ("head only", "small", "large")) == 3
    assert [one in plot([alone], None) for one in ("head only", "NaN", "nan")] == [True, False, False]


def test_axes_have_round_numbers() -> None:
    """Counts are powers of ten, with their doubles and fives on a short axis; losses are multiples of 1, 2 or 5."""
    assert _counts(8e5, 6e6) == [10**6, 2 * 10**6, 5 * 10**6]
    assert _counts(5e3, 2e9) == [10**power for power in range(4, 10)]
    assert [_step(least) for least in (1.22, 0.013, 5.0)] == [2.0, 0.02, 5.0]


def test_the_interval_is_students() -> None:
    """Three values: mean and 4.303 standard errors; one value has no interval."""
    found = Score.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.high == pytest.approx(2 + 4.303 / 3**0.5)
    assert Score.of([1.0]) == Score(1.0, None, None)


def test_labels_do_not_overlap() -> None:
    """Labels at one place are moved apart."""
    found = _labels([("lora r=4", 100.0, 50.0), ("dora r=4", 104.0, 52.0), ("full", 500.0, 50.0)], 300.0)
    assert abs(found["lora r=4"][2] - found["dora r=4"][2]) >= 14
    assert found["full"][0] == "end"
