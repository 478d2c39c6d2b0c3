"""``veneer compose``, and its folders in PEFT."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.compose.made import METHODS, saved, trained
from tests.tiny import tiny_tokenizer
from torch import Tensor

from veneer.adapters import LoRA
from veneer.checkpoints import attach, read_adapter, write_adapter
from veneer.cli.main import main
from veneer.compose import search
from veneer.compose.search import SearchResult
from veneer.models.load import load_base

IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base with a tokenizer, and an adapter of each method with a receipt of that base."""
    model = saved(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    bank = attach(model)
    for seed, (name, method) in enumerate(METHODS.items()):
        bank.insert(trained(saved(tmp_path / "twin"), method, name=name, seed=seed))
        bank.save(name, tmp_path / name, base_name=str(tmp_path / "base"))
    bank.detach()
    return tmp_path


def routed(folder: Path, mix: dict[str, float]) -> Tensor:
    """Logits under a mix of the adapters in sibling folders."""
    bank = attach(load_base(folder / "base", dtype="float32").model)
    for name in mix:
        bank.load(folder / name, name=name)
    with bank.use(mix), torch.no_grad():
        return bank.model(input_ids=IDS)[0]


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.parametrize("others", [("rslora", "pattern"), ("dora", "pattern")])
def test_the_folder_acts_as_the_mix(made: Path, capsys: pytest.CaptureFixture[str], others: tuple[str, str]) -> None:
    """A composed folder, read by us strictly and by PEFT, computes what the weighted mix of its parents does, within 1e-5."""
    mix = {"lora": 0.5, others[0]: -0.25, others[1]: 1.0}
    words = [f"{made / name}:{weight}" for name, weight in mix.items()]
    assert main(["compose", *words, "--out", f"{made}/sum", "--json"]) == 0
    report = report_of(capsys)
    wanted = routed(made, mix)
    assert torch.allclose(routed(made, {"sum": 1.0}), wanted, atol=2e-5)
    theirs = peft.PeftModel.from_pretrained(load_base(made / "base", dtype="float32").model, str(made / "sum"))
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=IDS)[0], routed(made, {"sum": 1.0}), atol=1e-5)
        assert torch.allclose(theirs(input_ids=IDS)[0], wanted, atol=2e-5)
    receipt = read_adapter(made / "sum").meta["receipt"]
    assert [(p["name"], p["weight"]) for p in receipt["parents"]] == list(mix.items())
    assert receipt["parents"][0]["tensors"] == read_adapter(made / "lora").meta["digest"]
    assert receipt["made_by"]["operation"] == "sum" and set(receipt["base"]) == {s["site"] for s in report["sites"]}
    assert report["error"] < 1e-5
    assert main(["inspect", f"{made}/sum"]) == 0
    said = capsys.readouterr().out
    assert "made by sum (error " in said and all(
        f"from {name} x {weight} (tensors " in said for name, weight in mix.items()
    )


def test_peft_linear_is_what_peft_makes(made: Path, tmp_path: Path) -> None:
    """The factor-wise form equals PEFT's own add_weighted_adapter, for negative weights too."""
    model = tmp_path / "base"
    for seed, name in enumerate(("x", "y")):
        write_adapter(trained(saved(tmp_path / "t"), LoRA(r=4, lora_alpha=6), name=name, seed=seed), tmp_path / name)
    theirs: Any = peft.PeftModel.from_pretrained(load_base(model, dtype="float32").model, str(tmp_path / "x"), "x")
    theirs.load_adapter(str(tmp_path / "y"), "y")
    theirs.add_weighted_adapter(["x", "y"], [0.7, -0.4], "z", combination_type="linear")
    theirs.set_adapter("z")
    with torch.no_grad():
        wanted = theirs(input_ids=IDS)[0]
    assert (
        main(["compose", f"{tmp_path}/x:0.7,{tmp_path}/y:-0.4", "--op", "peft_linear", "--out", f"{tmp_path}/z"]) == 0
    )
    assert torch.allclose(routed(tmp_path, {"z": 1.0}), wanted, atol=1e-5)


def test_losses_and_search(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With data the losses of base, parents, average and result are told; the searched mix is no worse than any of them."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(6)]
    (made / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["compose", f"{made}/lora", f"{made}/rslora", "--data", f"{made}/data.jsonl", "--json"]
    assert main([*command, "--out", f"{made}/plain"]) == 0
    losses = report_of(capsys)["losses"]
    assert list(losses) == ["base", "lora", "rslora", "average", "result"]
    assert main([*command, "--search", "--budget", "12", "--out", f"{made}/best"]) == 0
    report = report_of(capsys)
    assert len(report["search"]["tried"]) <= 12
    least = min(losses["lora"], losses["rslora"], losses["average"], losses["result"])
    assert report["losses"]["result"] == pytest.approx(report["search"]["loss"], abs=1e-5)
    assert report["losses"]["result"] <= least + 1e-5


def test_names_and_wishes_of_the_search(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parents of one name have a loss each; weights beside --search, no rows, and a search that ends with nothing are told."""
    (made / "data.jsonl").write_text('{"prompt": "What is 1?", "completion": "It is 1."}\n')
    shutil.copytree(made / "rslora", made / "twin" / "lora")
    data = ["--data", f"{made}/data.jsonl"]
    assert main(["compose", f"{made}/lora", f"{made}/twin/lora", *data, "--json", "--out", f"{made}/x"]) == 0
    assert list(report_of(capsys)["losses"]) == ["base", "lora", "lora (2)", "average", "result"]
    words = ["compose", f"{made}/lora", f"{made}/rslora", *data, "--out", f"{made}/out"]
    monkeypatch.setattr(search, "search_weights", lambda *args, **more: SearchResult((0.0, 0.0), 1.5, ()))
    for command, says, code in (
        (["compose", f"{made}/lora:0.5", *words[2:], "--search"], "--search finds the weights", 2),
        ([*words, "--limit", "0"], "--limit: expected at least 1, found 0", 2),
        ([*words, "--search"], "no mix has a lower loss on these examples than the base (1.5000)", 1),
    ):
        assert main(command) == code
        assert says in capsys.readouterr().err and not (made / "out").exists()


def test_operations_from_the_command_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation writes a folder that loads onto the base, and says which sites are worst where it is not exact."""
    for op, more in (
        ("ties", ["--density", "0.5", "--rank", "6"]),
        ("dare", ["--drop", "0.5", "--seed", "3", "--energy", "0.9"]),
        ("iso-c", ["--rank", "20"]),
        ("outside", ["--side", "in"]),
    ):
        assert main(["compose", f"{made}/lora", f"{made}/dora", "--op", op, *more, "--out", f"{made}/{op}"]) == 0, op
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{op} of lora x 1 + dora x 1: a LoRA adapter of rank")
        assert op == "outside" or lines[3].startswith("least accurate sites")
        assert routed(made, {op: 1.0}).isfinite().all()


def test_mistakes_are_one_sentence(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake ends with one line, its exit code and nothing written."""
    bank = attach(saved(made / "other", seed=9))
    bank.insert(trained(saved(made / "other", seed=9), name="foreign"))
    bank.save("foreign", made / "foreign")
    deep = trained(saved(made / "deeper", num_hidden_layers=3), name="deep")
    write_adapter(deep, made / "deep")
    write_adapter(trained(saved(made / "twin"), name="fresh", size=0.0), made / "fresh")
    broken = trained(saved(made / "twin"), name="broken")
    next(iter(broken.tensors.values()))["lora_A"][0, 0] = float("nan")
    write_adapter(broken, made / "broken")
    for words, says, code in (
        (["lora", "--rank", "0"], "--rank: expected at least 1", 2),
        (["lora", "--rank", "5"], "rank 5 is above the maximum of the result, 4", 1),
        (["lora", "foreign"], "were made on different bases", 1),
        (["lora:1", "lora:-1"], "nothing is left", 1),
        (["lora", "dora", "--op", "iso-c"], "iso-c makes all singular values equal", 1),
        (["lora", "dora", "--op", "outside"], "nothing is left: the change of the DoRA adapter", 1),
        (["lora", "--search"], "it needs --data FILE", 2),
        (["lora", "--base", f"{made}/other"], "was made on another base", 1),
        (["dora", "--base", f"{made}/lora"], "holds an adapter, not a base model", 1),
        (["lora", "nothing"], "no such folder", 1),
        (["deep", "--base", f"{made}/base"], "model.layers.2.mlp.down_proj: the base has no such layer", 1),
        (["fresh", "lora"], '"fresh" changes nothing', 1),
        (["broken", "lora"], "not finite", 1),
    ):
        words = [str(made / w) if w[0] in "ldfnb" else w for w in words]
        assert main(["compose", *words, "--out", f"{made}/out"]) == code, says
        captured = capsys.readouterr()
        assert says in captured.err and "bug in veneer" not in captured.err, captured.err
        assert captured.err.count("\n") == 1 or "problems" in captured.err  # a line for each
        assert not (made / "out").exists()
    assert main(["compose", f"{made}/lora", "--out", f"{made}/dora"]) == 1
    assert "a folder that is not empty" in capsys.readouterr().err


def test_many_parents(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two hundred parents are one adapter of the rank that their different factors have; the screen names some, the receipt all."""
    assert main(["compose", *[f"{made}/lora:0.5", f"{made}/rslora:-0.25"] * 100, "--out", f"{made}/many"]) == 0
    said = capsys.readouterr().out
    assert "and 192 more: a LoRA adapter of rank 13" in said
    assert len(read_adapter(made / "many").meta["receipt"]["parents"]) == 200
    assert torch.allclose(
        routed(made, {"many": 1.0}), routed(made, {"lora": 50.0, "rslora": -25.0}), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("command", ["compose", "extract"])
def test_a_disk_that_is_full(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Where the disk fills up while a folder is written, nothing is left there and one sentence says so."""
    words = {
        "compose": [f"{made}/lora", f"{made}/rslora"],
        "extract": ["--base", f"{made}/base", "--tuned", f"{made}/tuned", "--rank", "2"],
    }[command]
    saved(made / "tuned", seed=3)
    before = sorted(made.iterdir())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([command, *words, "--out", f"{made}/out"]) == 1
    said = capsys.readouterr().err
    assert "cannot be written: No space left on device" in said and said.count("\n") == 1
    assert sorted(made.iterdir()) == before
