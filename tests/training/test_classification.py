"""Heads for classes, numbers and words: trained by a run, resumed, saved as PEFT has them, scored and used from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, SIZES, digest, options
from tests.training.test_run import stop_after
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

import veneer
from veneer.adapters.runtime.route import Route
from veneer.checkpoints.receipt import labels_of, receipt_of
from veneer.cli.main import main
from veneer.config import TrainOptions
from veneer.errors import AdapterError, BaseModelError, ConfigError, DataError, RouteError, VeneerError
from veneer.models.classifiers.heads import check_trainable
from veneer.models.flat import FlatRunner
from veneer.models.layout import Flat
from veneer.models.load import load_base
from veneer.training import train
from veneer.training.run.setup import load_labelled

ENCODER, DECODER = "bert", "llama"


def framed_tokenizer() -> Any:
    """The tiny tokenizer with tokens around one text and two, as BERT's has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer


def rows(count: int, labels: tuple[Any, ...] = ("no", "yes")) -> list[dict[str, Any]]:
    """Pairs whose first text tells the label."""
    return [
        {"text": f"{'qbz'[i % len(labels)]} {i}", "text_pair": f"{i * 7 % 10}", "label": labels[i % len(labels)]}
        for i in range(count)
    ]


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines, or as CSV by the name."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
        else:
            file.writelines(json.dumps(row) + "\n" for row in found)
    return path


@pytest.fixture(scope="module", params=[ENCODER, DECODER])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base without a head, and rows of pairs with two and three classes."""
    folder: Path = tmp_path_factory.mktemp(str(request.param))
    tiny(request.param, **SIZES, **({"num_key_value_heads": 1} if request.param == DECODER else {})).save_pretrained(
        folder / "base"
    )
    (framed_tokenizer() if request.param == ENCODER else tiny_tokenizer()).save_pretrained(folder / "base")
    write(folder / "train.jsonl", rows(20))
    write(folder / "three.csv", rows(21, ("low", "mid", "top")))
    return folder


def chosen(place: Path, out: Path, **others: Any) -> dict[str, Any]:
    """Options of a short run with a head."""
    plain = {"task": "classification", "lora_dropout": 0.0, "learning_rate": 2e-2, "steps": 16}
    return options(place, out, **{**plain, **others})


def test_a_head_is_trained_resumed_saved_and_the_same_in_peft(place: Path, tmp_path: Path) -> None:
    """A stopped run ends with the same bits; PEFT's class for it computes the same logits to 1e-5, pairs with their types too."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    result = train(chosen(place, tmp_path / "a", valid=(place / "train.jsonl",)), console=QUIET)
    losses = [loss for _, loss in result.jobs["a"].losses]
    assert losses[-1] < 0.97 * losses[0]
    with pytest.raises(KeyboardInterrupt):
        train(chosen(place, tmp_path / "b" / "a", valid=(place / "train.jsonl",)), console=stop_after(4))
    train(chosen(place, tmp_path / "b" / "a", valid=(place / "train.jsonl",)), console=QUIET)
    assert digest(tmp_path / "a") == digest(tmp_path / "b" / "a")

    base = load_base(place / "base", dtype="float32", task="classification")
    bank = veneer.attach(base.model)
    adapter = bank.load(result.adapter, name="a")
    assert adapter.meta["notes"] == [] and labels_of(adapter) == ("no", "yes")
    assert receipt_of(adapter)["task"] == "classification"
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    texts = [("word q 1", "7"), ("word  2", "4 and more")]
    if getattr(base.model.config, "type_vocab_size", 0):
        inputs = [tokenizer(*pair, return_tensors="pt", return_token_type_ids=True) for pair in texts]
        assert int(inputs[0]["token_type_ids"].sum()) > 0
    else:
        inputs = [tokenizer("\n".join(pair), return_tensors="pt") for pair in texts]
        for one in inputs:
            one.pop("token_type_ids", None)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(result.adapter, num_labels=2).eval()
    theirs.config.pad_token_id = 2
    from veneer.data.batch import make_batch
    from veneer.data.labelled import LabelledRenderer
    from veneer.data.labels import Classes
    from veneer.data.rows.row import Row

    renderer = LabelledRenderer(tokenizer, "classification", Classes(("no", "yes")), unlabelled=True)
    parts = [renderer.render_many([Row("labelled", "", text=one, second=two)]) for one, two in texts]
    batch = make_batch([next(iter(found))[1][0].example for found in parts], "a")  # type: ignore[union-attr]
    runner = FlatRunner(base.model)
    with torch.no_grad(), bank.use("a"):
        found = runner.logits(batch)
        expected = torch.cat([theirs(**one).logits for one in inputs])
        assert (found - expected).abs().max() <= 1e-5
        assert (torch.cat([base.model(**one).logits for one in inputs]) - expected).abs().max() <= 1e-5


def test_heads_with_different_labels_share_a_batch(place: Path, tmp_path: Path) -> None:
    """Jobs with two and three classes and other methods end as each alone, and each row of a mixed batch is as alone."""
    jobs = [
        {"name": "two", "data": (str(place / "train.jsonl"),)},
        {"name": "three", "data": (str(place / "three.csv"),), "method": "dora", "seed": 3},
    ]
    both = train(chosen(place, tmp_path / "both", jobs=jobs, data=(), tokens_per_shared_pass=512), console=QUIET)
    for job in jobs:
        own = {key: value for key, value in job.items() if key != "name"}
        alone = train(chosen(place, tmp_path / str(job["name"]), **own), console=QUIET)
        one, other = (
            veneer.attach(load_base(place / "base", dtype="float32", task="classification").model).load(path, name="a")
            for path in (both.jobs[str(job["name"])].adapter, alone.adapter)
        )
        for (site, key, a), (_, _, b) in zip(one.named_tensors(), other.named_tensors(), strict=True):
            assert torch.allclose(a, b, atol=1e-5), (site, key)

    model = load_base(place / "base", dtype="float32", task="classification").model
    bank = veneer.attach(model)
    for name, done in both.jobs.items():
        bank.load(done.adapter, name=name)
    segments = [[5, 6, 7], [8, 9], [10] * 5, [11, 12, 13]]
    names = ["three", "two", "three", "two"]
    flat, runner = Flat.of(segments), FlatRunner(model)
    owner = torch.tensor([["two", "three"].index(name) for name, ids in zip(names, segments, strict=True) for _ in ids])
    with torch.no_grad():
        with bank.use(Route.tokens(["two", "three"], owner), keep=runner.head_cells(flat)):
            mixed = runner.logits(flat)
        for row, name, ids in zip(mixed, names, segments, strict=True):
            with bank.use(name):
                alone_L = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
            assert (row[: len(alone_L)] - alone_L).abs().max() <= 2e-6
            assert row[len(alone_L) :].isneginf().all()
        with bank.use({"two": 0.5, "three": 0.5}), pytest.raises(RouteError, match="different numbers of labels"):
            runner.logits(flat)


@pytest.mark.parametrize("task", ["regression", "token-classification"])
def test_numbers_and_words_are_learnt(task: str, place: Path, tmp_path: Path) -> None:
    """The loss falls, and the file of predictions has a number for each text, or a label for each word."""
    found = [{"text": "q" if i % 2 else "b", "label": [0.5, 2.0][i % 2]} for i in range(12)]
    if task == "token-classification":
        two: list[dict[str, Any]] = [
            {"text": ["b", "a", "b"], "label": ["z", "x", "z"]},
            {"text": ["a", "q"], "label": ["x", "y"]},
        ]
        found = two * 6
    file = write(tmp_path / "rows.jsonl", found)
    given = chosen(place, tmp_path / "run", task=task, data=(file,), valid=(file,), steps=60, learning_rate=3e-2)
    result = train(given, console=QUIET)
    losses = [loss for _, loss in result.jobs["run"].losses]
    assert losses[-1] < 0.25 * losses[0]
    assert main(["predict", str(file), "--adapter", f"{tmp_path}/run", "--out", f"{tmp_path}/out.jsonl"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    if task == "regression":
        assert all(abs(line["prediction"] - row["label"]) < 0.7 for line, row in zip(lines, found, strict=True))
    else:
        assert [line["prediction"] for line in lines] == [row["label"] for row in found]


def test_labels_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    """A run tells how many labels it lost to the maximum length, of training and of held-out rows."""
    file = write(tmp_path / "rows.jsonl", [{"text": list("abcdef"), "label": list("xyxyxy")}])
    given = TrainOptions(data=(file,), valid=(file,), task="token-classification", max_length=6, truncate="end")
    base: Any = SimpleNamespace(tokenizer=framed_tokenizer(), model=SimpleNamespace())
    found = load_labelled(given, base, 6)
    kept = sum(found.train[0].weights)
    assert 0 < kept < 6 and found.report.lost == 2 * (6 - kept)
    assert f"rows cut at 6 tokens: 2, which lost {2 * (6 - kept):.0f} trained tokens" in found.remarks


def test_evaluate_and_predict_agree_with_each_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are those of the predictions that are written, for two adapters at once; rows without labels are enough to predict."""
    given = chosen(place, tmp_path / "run", data=(place / "three.csv",), sweep={"seed": [0, 1]}, steps=6)
    result = train(given, console=QUIET)
    folders = [str(job.adapter) for job in result.jobs.values()]
    words = ["evaluate", *folders, "--data", f"{place}/three.csv", "--dtype", "float32"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["sets"][f"{place}/three.csv"]
    bare = write(tmp_path / "bare.csv", [{key: row[key] for key in ("text", "text_pair")} for row in rows(21, ("", "", ""))])  # fmt: skip
    out = tmp_path / "out.csv"
    adapters = [word for folder in folders for word in ("--adapter", folder)]
    assert main(["predict", str(bare), *adapters, "--out", str(out), "--dtype", "float32"]) == 0
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [row["label"] for row in rows(21, ("low", "mid", "top"))]
    for name, entry in report.items():
        right = [line[f"{name}.prediction"] == label for line, label in zip(lines, expected, strict=True)]
        score = entry["scores"]["accuracy"]
        assert score["value"] == pytest.approx(sum(right) / 21) and score["low"] <= score["value"] <= score["high"]
    assert main(words) == 0 and "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"valid": [{"text": "a", "label": "maybe"}]}, DataError, "'maybe' is not a label of the training rows, which have no, yes"),
        ({"data": [{"text": "a", "label": "yes"}] * 4}, DataError, "every row has the label 'yes'; a classifier needs examples of two"),
        ({"data": [{"text": "a", "label": "good"}] * 4, "task": "regression"}, DataError, "expected a number to predict, found"),
        ({"data": [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]}, DataError, "expected the name of a class, found"),
        ({"data": [{"text": "a"}, {"text": "b"}]}, DataError, "label: missing; every row needs a label"),
        ({"data": [{"text": ["a", "b", "c"], "label": ["x", "y"]}], "task": "token-classification"}, DataError, "a label for each of 3"),
        ({"jobs": [{"name": "a"}, {"name": "b", "task": "sft"}]}, ConfigError, "their tasks differ: classification and sft"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_one_sentence(
    changed: dict[str, Any], error: type[VeneerError], says: str, place: Path, tmp_path: Path
) -> None:
    """Labels unseen in training, one class, text for numbers, numbers for classes, no label, and jobs that need different heads."""
    given = {
        key: (write(tmp_path / f"{key}.jsonl", value),) if key in ("data", "valid") else value
        for key, value in changed.items()
    }
    with pytest.raises(error, match=says):
        train(chosen(place, tmp_path / "run", **given), console=QUIET)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_head_needs_a_base_of_its_width_and_kind(place: Path, tmp_path: Path) -> None:
    """A head of another width says so; a base without a head, and a model that generates, say what to do."""
    result = train(chosen(place, tmp_path / "run", steps=1), console=QUIET)
    wide = tiny("bert" if (place / "base" / "config.json").read_text().count("bert") else "llama", num_hidden_layers=1)
    wide.save_pretrained(tmp_path / "wide")
    framed_tokenizer().save_pretrained(tmp_path / "wide")
    bank = veneer.attach(load_base(tmp_path / "wide", dtype="float32", task="classification").model)
    with pytest.raises(VeneerError, match="the head was trained on a base with 16 features, this one has 32"):
        bank.load(result.adapter, name="a", force=("base",))
    plain = veneer.attach(load_base(place / "base", dtype="float32").model)
    with pytest.raises(AdapterError, match="has no head for classes; load the base with one"):
        plain.add("a", veneer.LoRA(r=2), outputs=2)


def test_a_base_that_the_task_cannot_train_is_refused_at_once() -> None:
    """Before rows are read: an encoder has no tokens to predict, and an encoder-decoder has two inputs."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = BertModel(BertConfig(**sizes))
    check_trainable("b", encoder, "classification")
    with pytest.raises(BaseModelError, match="b: task sft needs a language model, and BertModel predicts no tokens"):
        check_trainable("b", encoder, "sft")
    encoder.config.is_encoder_decoder = True
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        check_trainable("b", encoder, "classification")
