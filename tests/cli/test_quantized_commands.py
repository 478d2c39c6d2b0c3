"""Quantized bases from the command line: quantize, train, use, merge, and what fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.made import write_place

from veneer.cli.main import main
from veneer.models.load import load_base

Run = Callable[..., tuple[int, str, str]]
TRAIN = ("train", "train.jsonl", "--steps", "2", "--batch-size", "2", "--no-plan", "--dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and examples."""
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in that folder: (exit code, output, errors)."""
    monkeypatch.chdir(place)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return (code, *capsys.readouterr())

    return call


def test_a_quantized_base_is_trained_on_used_and_merged(run: Run) -> None:
    """A base quantized on disk and one quantized while it is read are the same; the adapter is used on it again and merged into it."""
    code, out, _ = run("quantize", "base", "--to", "nf4", "--out", "nf4")
    assert code == 0 and "7 linear layers to nf4" in out and "differ from the exact ones by" in out
    code, _, err = run("quantize", "base", "--to", "nf4", "--out", "nf4")
    assert code == 1 and "not empty" in err
    code, out, _ = run(*TRAIN, "--base", "base", "--quantize", "nf4", "--method", "dora", "--out", "one")
    assert code == 0 and "finished after 2 steps" in out
    assert run(*TRAIN, "--base", "nf4", "--method", "dora", "--out", "two")[0] == 0
    records = [json.loads(text) for text in map(_receipt, (Path("one"), Path("two")))]
    assert {record["dtype"] for record in records[0]["base"].values()} == {"nf4"}
    assert records[0]["base"] == records[1]["base"]
    code, found, err = run("evaluate", "one", "--data", "valid.jsonl", "--json", "--dtype", "float32")
    assert code == 0 and "the base is in" not in err
    code, plain, err = run(
        "evaluate", "one", "--data", "valid.jsonl", "--json", "--dtype", "float32", "--quantize", "none"
    )
    assert code == 0 and "is in float32 here and was in nf4" in err and found != plain
    code, out, _ = run("merge", "two", "--out", "merged", "--allow-rounding")
    assert code == 0 and "logits: at most" in out
    assert not hasattr(load_base("merged", dtype="float32").model.config, "quantization_config")
    code, out, _ = run("merge", "one", "--out", "as-trained", "--no-probe")
    assert code == 0 and "in nf4, whose weights differ from the plain ones by" in out
    code, _, err = run("merge", "one", "--to", "nf4", "--out", "lost")
    assert code == 1 and "round the fine-tune away" in err and "--quantize none" in err and not Path("lost").exists()
    rest = ("--quantize", "none", "--to", "int8", "--allow-rounding", "--no-probe")
    code, out, _ = run("merge", "one", *rest, "--out", "eight")
    assert code == 0 and "linear layers in int8" in out and "of their norm, in int8" in out
    assert load_base("eight", dtype="float32").model.config.quantization_config["load_in_8bit"]
    code, out, _ = run("inspect", "two", "--base", "nf4")
    assert code == 0 and "fingerprints and probes agree" in out


def test_adapters_of_a_quantized_base_are_composed_measured_merged_and_extracted(run: Run) -> None:
    """Composing, spectra, a merge with `modules_to_save` and extracting read the dequantized weights of a folder in 4 bits."""
    assert run("quantize", "base", "--to", "nf4", "--out", "four")[0] == 0
    assert run(*TRAIN, "--base", "four", "--method", "dora", "--out", "d")[0] == 0
    assert run(*TRAIN, "--base", "four", "--seed", "3", "--modules-to-save", "lm_head", "--out", "l")[0] == 0
    assert run(*TRAIN, "--base", "four", "--seed", "4", "--out", "m")[0] == 0
    code, out, _ = run("compose", "d:0.5", "m:0.5", "--base", "four", "--out", "sum")
    assert code == 0 and "equals the exact change up to rounding" in out
    code, out, _ = run("inspect", "sum", "--base", "four")
    assert code == 0 and "fingerprints and probes agree" in out
    code, out, _ = run("inspect", "d", "--base", "four", "--spectra", "--json")
    assert code == 0 and len(json.loads(out)["sites"]) == 7
    code, out, _ = run("merge", "l", "--base", "four", "--out", "whole", "--dtype", "float32", "--json")
    found = json.loads(out)
    assert code == 0 and found["logits"]["merged"] < 1e-5 < found["logits"]["change"]
    assert run("merge", "m", "--base", "four", "--out", "tuned", "--dtype", "float32", "--no-probe")[0] == 0
    code, out, _ = run("extract", "--base", "four", "--tuned", "tuned", "--rank", "16", "--out", "back", "--json")
    assert code == 0 and json.loads(out)["kept"] > 0.999


def _receipt(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        return str(file.metadata()["veneer"])


def test_an_adapter_of_a_plain_layer_too_finds_its_quantized_base(run: Run) -> None:
    """The head of a quantized base is plain; an adapter of it and of quantized layers is used and merged on the base of its training."""
    assert (
        run(*TRAIN, "--base", "base", "--quantize", "nf4", "--target-modules", "q_proj,lm_head", "--out", "head")[0]
        == 0
    )
    code, _, err = run("evaluate", "head", "--data", "valid.jsonl", "--json", "--dtype", "float32")
    assert code == 0 and "the base is in" not in err
    code, out, _ = run("merge", "head", "--out", "head-merged", "--no-probe")
    assert code == 0 and "in nf4, whose weights differ from the plain ones by" in out


def test_a_calibrated_base_is_written_in_the_same_format(run: Run) -> None:
    """Calibration rows change the values, and no names; config.json and the receipt of an adapter have their hash."""
    code, out, _ = run("quantize", "base", "--to", "fp4", "--calibrate", "train.jsonl", "--out", "calibrated")
    assert code == 0 and "chosen by the layers' outputs on" in out and "of 37 examples" in out
    assert run("quantize", "base", "--to", "fp4", "--out", "rounded")[0] == 0
    files = [load_file(f"{folder}/model.safetensors") for folder in ("calibrated", "rounded")]
    packed = [name for name in files[0] if name.endswith("proj.weight")]
    assert files[0].keys() == files[1].keys() and len(packed) == 7
    assert all(files[0][name].shape == files[1][name].shape for name in packed)
    assert not any(torch.equal(files[0][name], files[1][name]) for name in packed)
    record = json.loads(Path("calibrated/config.json").read_text("utf-8"))["quantization_config"]["calibration"]
    assert record["base"] == "base" and record["examples"] == 37 and len(record["sha256"]) == 64
    assert run(*TRAIN, "--base", "calibrated", "--out", "on-calibrated")[0] == 0
    assert json.loads(_receipt(Path("on-calibrated")))["calibration"] == record


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("base", "--calibrate", "few.jsonl"), "tokens; expected at least 128; give more or longer rows"),
        (("base", "--calibrate", "empty.jsonl"), "empty.jsonl"),
        (("base", "--calibrate-tokens", "500"), "--calibrate-tokens is about calibration examples"),
        (("quantized", "--calibrate", "train.jsonl"), "are quantized already"),
    ],
)
def test_calibration_that_cannot_be(run: Run, words: tuple[str, ...], said: str) -> None:
    """Too few tokens, a file without rows, options without rows and a quantized base are refused, and nothing is written."""
    Path("few.jsonl").write_text(Path("train.jsonl").read_text("utf-8").splitlines()[0], encoding="utf-8")
    Path("empty.jsonl").write_text("", encoding="utf-8")
    if not Path("quantized").exists():
        assert run("quantize", "base", "--to", "int8", "--out", "quantized")[0] == 0
    code, _, err = run("quantize", *words, "--to", "nf4", "--out", "refused")
    assert code in (1, 2) and said in err and not Path("refused").exists()


def test_what_fits_is_planned_from_the_config_alone(run: Run) -> None:
    """A folder with a config.json and no weights is enough; the best row's command comes last, and the exit code is 1 if nothing fits."""
    Path("seven").mkdir()
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, **sizes}
    Path("seven/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    code, out, _ = run("plan", "--base", "seven", "--memory", "24GB")
    assert code == 0 and "6.74 billion parameters" in out
    assert out.splitlines()[-1].startswith("veneer train DATA --base seven --dtype bfloat16 --r 64")
    code, out, _ = run("plan", "--base", "seven", "--memory", "8GB", "--method", "dora", "--r", "8", "--json")
    found = json.loads(out)
    assert code == 0 and "--method dora --quantize nf4 --r 8" in found["command"]
    assert {row["r"] for row in found["settings"]} == {8} and found["parameters"] == 6_738_415_616
    code, out, _ = run("plan", "--base", "seven", "--memory", "2GB")
    assert code == 1 and "nothing fits into 2GB" in out
    code, _, err = run("plan", "--base", "seven", "--memory", "much")
    assert code == 2 and "--memory: expected a size" in err


def test_a_small_base_on_this_machine_is_timed(run: Run) -> None:
    """With the weights at hand each row has the time of 1,000 tokens; --no-plan leaves it out."""
    code, out, _ = run("plan", "--base", "base", "--memory", "2GB", "--r", "4", "--json")
    rows = json.loads(out)["settings"]
    assert code == 0 and len(rows) == 6 and all(row["seconds"] > 0 for row in rows)
    code, out, _ = run("plan", "--base", "base", "--memory", "2GB", "--r", "4")
    assert code == 0 and "1,000 tokens here" in out
    code, out, _ = run("plan", "--base", "base", "--memory", "2GB", "--r", "4", "--no-plan")
    assert code == 0 and "1,000 tokens here" not in out


def test_a_receipt_names_another_precision(run: Run, place: Path) -> None:
    """An adapter of a plain base says, on a quantized one, how far the weights are apart; the plain base's fingerprint is not confused."""
    import veneer

    assert run(*TRAIN, "--base", "base", "--out", "plain")[0] == 0
    bank = veneer.attach(load_base("base", dtype="float32", quantize="nf4").model)
    notes = bank.load("plain").meta["notes"]
    assert any("the base is in nf4 here and was in float32" in note and "differ by" in note for note in notes)
    assert torch.isfinite(torch.tensor(float(notes[0].split("differ by ")[1].split("%")[0])))
