"""``veneer evaluate``: the base, adapters and mixes on held-out examples and a general text; ``train`` that watches the latter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.compose.made import METHODS, saved, trained
from tests.tiny import tiny_tokenizer

from veneer.checkpoints import attach
from veneer.cli.evaluate import _lines
from veneer.cli.main import main
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.evaluate.general import general_text, pieces
from veneer.evaluate.losses import compare, example_losses
from veneer.evaluate.scores import text_scores
from veneer.models.flat import FlatRunner
from veneer.models.load import load_base
from veneer.serve.engine.request import SamplingParams
from veneer.serve.generation import TextGenerator


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base with a tokenizer, a LoRA and a DoRA adapter of it, and eight rows."""
    bank = attach(saved(tmp_path / "base"))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("lora", "dora")):
        bank.insert(trained(saved(tmp_path / "twin"), METHODS[name], name=name, seed=seed))
        bank.save(name, tmp_path / name, base_name=str(tmp_path / "base"))
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_route_is_judged_and_compared(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses, and paired differences with their intervals, are those of the library, for adapters and mixes, on rows and text."""
    words = ["evaluate", f"{made}/lora", f"{made}/dora", "--data", f"{made}/rows.jsonl", "--mix", "lora:0.5,dora:-0.5"]
    text = general_text()[:20000]
    (made / "text.txt").write_text(text)
    assert main([*words, "--general-text", f"{made}/text.txt", "--dtype", "float32", "--json"]) == 0
    found = told(capsys)
    assert list(found["sets"]) == [f"{made}/rows.jsonl", "general text"]
    base = load_base(made / "base", dtype="float32")
    bank, runner = attach(base.model), FlatRunner(base.model)
    for name in ("lora", "dora"):
        bank.load(made / name, name=name)
    rows = load_examples([made / "rows.jsonl"], Renderer(base.tokenizer))[0][:]
    for examples, entry in zip((rows, pieces(text, base.tokenizer)), found["sets"].values(), strict=True):
        assert entry["examples"] == len(examples)
        plain = example_losses(runner, examples, bank=bank, route=None)
        routes = {"lora": "lora", "dora": "dora", "lora:0.5,dora:-0.5": {"lora": 0.5, "dora": -0.5}}
        assert entry["routes"]["base"]["loss"] == pytest.approx(plain.mean, abs=1e-6)
        for name, route in routes.items():
            losses = example_losses(runner, examples, bank=bank, route=route)  # type: ignore[arg-type]
            apart, row = compare(losses, plain), entry["routes"][name]
            assert row["loss"] == pytest.approx(losses.mean, abs=1e-6)
            assert (row["against_base"], row["low"], row["high"]) == pytest.approx(
                (apart.mean, apart.low, apart.high), abs=1e-6
            )
            assert row["low"] < row["against_base"] < row["high"]


def test_against_another_and_in_words(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two adapters can be held against each other; the line for a person says the difference and its interval."""
    words = ["evaluate", f"{made}/lora", f"{made}/dora", "--data", f"{made}/rows.jsonl", "--limit", "4"]
    assert main([*words, "--against", "lora", "--json"]) == 0
    routes = told(capsys)["sets"][f"{made}/rows.jsonl"]["routes"]
    assert routes["dora"]["against_lora"] == pytest.approx(routes["dora"]["loss"] - routes["lora"]["loss"], abs=1e-9)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("rows.jsonl: 4 examples, 40 tokens") or "4 examples" in lines[0]
    assert "against base" in lines[2] and "(95 %:" in lines[2]
    row = {"loss": 1.0, "against_base": 0.1, "low": -0.1, "high": 0.3}
    for low, high, word in ((-0.3, -0.1, "better"), (-0.1, 0.3, "no clear difference"), (0.1, 0.3, "worse")):
        entry = {"examples": 1, "tokens": 2000, "routes": {"lora": {**row, "low": low, "high": high}}}
        found = _lines("rows", entry, "base")
        assert found[0] == "rows: 1 example, 2,000 tokens" and found[1].endswith(f"), {word}")


def test_pieces_lie_evenly_over_the_text() -> None:
    """The last of them is near the end, however many pieces the text has."""
    for count, starts in ((3, [0, 6, 12]), (64, list(range(0, 20, 2)))):
        found = pieces("text", lambda text, **given: {"input_ids": list(range(20))}, length=2, count=count)
        assert [example.ids[0] for example in found] == starts


def test_mistakes_are_one_sentence(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to judge on, a mix of what is not loaded, weights and limits that are none, files that are not there."""
    (made / "bytes").write_bytes(b"\xff\xfe\x00")
    rows = ["--data", f"{made}/rows.jsonl"]
    for words, says, code in (
        ([], "no examples given", 2),
        ([*rows, "--mix", "other:1"], "'other' is not loaded", 2),
        ([*rows, "--mix", "lora:many"], "'many' is not a weight", 2),
        ([*rows, "--mix", "lora:nan"], "'nan' is not a weight", 2),
        ([*rows, "--against", "nobody"], "--against nobody", 2),
        (
            [*rows, "--against", "lora", "--task", "dpo"],
            "--against compares losses of tokens, and --task dpo has none",
            2,
        ),
        ([*rows, "--limit", "0"], "--limit: expected at least 1", 2),
        (["--data", f"{made}/none.jsonl"], "none.jsonl", 1),
        (["--general-text", f"{made}/bytes"], "cannot be read as UTF-8", 1),
    ):
        assert main(["evaluate", f"{made}/lora", *words]) == code, says
        captured = capsys.readouterr()
        assert says in captured.err and "bug in veneer" not in captured.err, captured.err


def test_training_watches_a_general_text(made: Path) -> None:
    """With ``watch_general`` each look tells the loss on Python's documentation too, which at step 0 is the base's."""
    from tests.training.made import QUIET

    from veneer.training import train

    base = load_base(made / "base", dtype="float32")
    options: dict[str, Any] = {
        "data": (made / "rows.jsonl",),
        "valid_fraction": 0.25,
        "watch_general": True,
        "out": made / "run",
    }
    train({**options, "steps": 4, "eval_every": 2, "r": 2, "batch_size": 2, "plan": False}, base=base, console=QUIET)
    lines = [json.loads(line) for line in next((made / "run" / "metrics").iterdir()).read_text().splitlines()]
    looks = {line["step"]: line["general_loss"] for line in lines if "general_loss" in line}
    assert list(looks) == [0, 2, 4]
    text = pieces(general_text(), base.tokenizer, length=256, count=16)
    assert looks[0] == pytest.approx(example_losses(FlatRunner(base.model), text).mean, abs=1e-5)
    assert looks[4] != looks[0]


def test_preferences_are_evaluated_against_the_base(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base has the loss of a tie; an adapter has a margin of its own."""
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i * i}.", "rejected": "Who knows?"} for i in range(4)]
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", f"{made}/lora", "--data", f"{made}/pairs.jsonl", "--task", "dpo", "--dtype", "float32"]
    assert main([*words, "--json"]) == 0
    routes = told(capsys)["sets"][f"{made}/pairs.jsonl"]["routes"]
    assert routes["base"]["loss"] == pytest.approx(0.6931472) and routes["base"]["reward_accuracy"] == 0.5
    assert routes["lora"]["reward_margin"] != 0.0
    assert main(words) == 0 and "reward accuracy" in capsys.readouterr().out


def test_answers_are_generated_and_scored(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --generate the greedy answers of the base and of every adapter are scored; rows with one prompt are references of one answer."""
    rows = [{"prompt": f"What is {i // 2}?", "completion": f"It is {i}."} for i in range(6)]
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", f"{made}/lora", "--data", f"{made}/pairs.jsonl", "--dtype", "float32", "--generate"]
    assert main([*words, "--max-tokens", "6", "--json"]) == 0
    found = told(capsys)["answers"]
    assert set(found) == {"base", "lora"}
    base = load_base(made / "base", dtype="float32")
    bank = attach(base.model)
    bank.load(made / "lora", name="lora")
    generator = TextGenerator(base.model, base.tokenizer, bank)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, seed=0)
    answers = [generator.write([{"role": "user", "content": f"What is {i}?"}], "lora", sampling) for i in range(3)]
    expected = text_scores(answers, [[f"It is {2 * i}.", f"It is {2 * i + 1}."] for i in range(3)])
    assert {name: one["value"] for name, one in found["lora"].items()} == pytest.approx(
        {name: one.value for name, one in expected.items()}
    )
    assert main([*words, "--max-tokens", "2", "--limit", "1"]) == 0
    assert "answers to 1 prompts" in capsys.readouterr().out
