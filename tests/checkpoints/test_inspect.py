"""``veneer inspect``: what it shows without a base, against a base, and what it finds unusual."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import config, make_folder, peft_folder, q_tensors, stir
from tests.tiny import tiny
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.checkpoints import read_adapter
from veneer.checkpoints.inspect import SiteView, unusual, view
from veneer.checkpoints.logit_check import verify_logits
from veneer.cli.main import main

METHODS = {"lora": LoRA(r=4), "rslora": LoRA(r=4, use_rslora=True), "dora": DoRA(r=4)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny base in a folder, as a command takes it."""
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(folder: Path, method: Any, **options: Any) -> Any:
    bank = veneer.attach(tiny("llama"))
    adapter = bank.add("a", method)
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "", by=0.02)
    bank.save("a", folder, **options)
    return bank


@pytest.mark.parametrize("name", METHODS)
def test_sites_ranks_and_norms_are_those_of_the_dense_change(name: str, tmp_path: Path) -> None:
    """||s B A||_F is computed from the factors; it equals the norm of the dense product at every site."""
    bank = saved(tmp_path / "a", METHODS[name])
    found = view(read_adapter(tmp_path / "a"))
    assert (found.method, len(found.sites), found.parameters) == (
        {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[name],
        14,
        bank["a"].num_parameters(),
    )
    for site in found.sites:
        own = bank["a"].tensors[site.name]
        dense = bank["a"].scale(site.name) * (own["lora_B"].detach() @ own["lora_A"].detach())
        assert site.norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert (site.out, site.in_) == tuple(dense.shape)
        assert (site.magnitude is not None) == (name == "dora")
    assert json.loads(json.dumps(asdict(found)))["receipt"]["version"] == veneer.__version__


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_shows_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Method, sites, ranks, sizes and receipt, for a person and as JSON; no model is loaded."""
    saved(tmp_path / "a", METHODS["dora"], base_name="org/base", receipt={"data": "d" * 64})
    code, out, _ = run(capsys, tmp_path / "a")
    assert code == 0
    for part in ("DoRA, 14 sites", "base: org/base", "q_proj", "magnitude", "data dddddddddddd", "probes of 14 sites"):
        assert part in out
    code, out, _ = run(capsys, tmp_path / "a", "--json")
    assert code == 0 and len(json.loads(out)["sites"]) == 14
    code, out, _ = run(capsys, tmp_path / "a", "--sites")
    assert "model.layers.1.self_attn.q_proj" in out


def test_a_folder_of_peft_is_shown_with_its_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a receipt that is said."""
    peft_folder(tmp_path / "a")
    code, out, _ = run(capsys, tmp_path / "a")
    assert code == 0
    assert "receipt: none" in out


@pytest.mark.parametrize("name", METHODS)
def test_against_the_right_base_everything_agrees(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fingerprints, probes and logits, against a merge and against what was recorded at saving."""
    saved(tmp_path / "a", METHODS[name], logits=True)
    code, out, _ = run(capsys, tmp_path / "a", "--base", base, "--verify", "--dtype", "float32")
    assert code == 0
    for part in (
        "fingerprints and probes agree",
        "of ||W||",
        "logits in float32: the adapter changes them",
        "they equal those in the receipt",
    ):
        assert part in out
    assert "WRONG" not in out


def test_against_another_base_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit code 1; with --force base the rest is shown, and that it is not the base."""
    saved(tmp_path / "a", METHODS["lora"], logits=True)
    tiny("llama", seed=5).save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, tmp_path / "a", "--base", tmp_path / "other")
    assert code == 1 and "this is not the base" in err
    code, out, _ = run(
        capsys, tmp_path / "a", "--base", tmp_path / "other", "--force", "base", "--verify", "--dtype", "float32"
    )
    assert code == 1
    assert "it is NOT the base" in out and "WRONG: the adapter's logits differ from those recorded" in out


def test_what_is_its_own_is_shown(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head, rows and norms of the adapter's own, with how far they are from the base's; --verify holds them against a merge too."""
    method = LoRA(r=2, target_modules=("q_proj",), modules_to_save=("model.norm",), trainable_token_indices=(5, 9))
    saved(tmp_path / "a", method, logits=True)
    code, out, _ = run(capsys, tmp_path / "a")
    assert code == 0 and "model.embed_tokens: rows of 2 tokens, 2 x 32" in out and "model.norm: weight, 32" in out
    code, out, _ = run(capsys, tmp_path / "a", "--base", base, "--verify", "--dtype", "float32")
    assert code == 0 and "% from the base's" in out and "WRONG" not in out
    assert run(capsys, tmp_path / "a", "--json")[0] == 0


def test_wrong_words_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--verify without a base is exit code 2; no adapter, an unknown override and a broken folder are 1."""
    saved(tmp_path / "a", METHODS["lora"])
    assert run(capsys, tmp_path / "a", "--verify")[0] == 2
    assert run(capsys, tmp_path / "nowhere")[0] == 1
    assert run(capsys, tmp_path / "a", "--force", "all")[0] == 1
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    code, out, err = run(capsys, tmp_path / "a")
    assert (code, out) == (1, "") and "Traceback" not in err and err.count("\n") == 1


def test_what_is_unusual_is_said(tmp_path: Path) -> None:
    """Ranks beyond the layer, extreme scales, sites without a change, and outliers."""
    tensors = q_tensors(r=40)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].zero_()
    found = view(read_adapter(make_folder(tmp_path / "a", tensors, config(r=40, lora_alpha=4000))))
    text = "\n".join(found.unusual)
    assert "rank is greater than the layer's own sizes" in text
    assert "scaled by 100" in text
    assert "the change is zero at model.layers.1" in text
    loud = [
        found.sites[0].__class__(
            f"m.{i}.q", "linear", 4, 8, 2, 32, 32, 9, 100.0 if i == 3 else 1.0, 0.9 if i == 2 else 0.1
        )
        for i in range(6)
    ]
    text = "\n".join(unusual(loud))
    assert "far larger than elsewhere at m.3.q (100 times the median)" in text
    assert "large beside the base's own weight at m.2.q (90%)" in text


def test_layers_of_one_name_in_a_block_count_once() -> None:
    """BERT has three layers named dense in each block; query is in as many blocks as they are."""
    names = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    sites = [SiteView(f"layer.{i}.{name}", "linear", 4, 8, 2, 32, 32, 9, 1.0, 0.1) for i in range(6) for name in names]
    assert unusual(sites) == []
    (found,) = unusual([site for site in sites if not site.name.endswith("query") or site.name[6] in "01"])
    assert found == "some layers are adapted in fewer blocks than others: query (2 of 6)"


def test_an_adapter_that_does_nothing_is_found(tmp_path: Path) -> None:
    """A fresh adapter moves no logit: --verify says so."""
    bank = veneer.attach(tiny("llama"))
    bank.add("a", LoRA(r=2))
    found = verify_logits(bank, "a")
    assert not found["ok"] and found["says"] == ["the adapter changes no logit"]


def test_a_layer_that_computes_something_else_is_found() -> None:
    """If what the layers compute were not the merged weights, --verify would see it."""
    bank = veneer.attach(tiny("llama"))
    adapter = bank.add("a", LoRA(r=2))
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    assert verify_logits(bank, "a")["ok"]
    state = {name: value.clone() for name, value in bank.model.state_dict().items()}
    real = bank.merged_state_dict
    bank.merged_state_dict = lambda route: {
        key: value * 1.1 if "q_proj" in key else value for key, value in real(route).items()
    }  # type: ignore[method-assign]
    found = verify_logits(bank, "a")
    assert not found["ok"] and "differ from those of the merged weights" in found["says"][0]
    assert all(torch.equal(value, state[name]) for name, value in bank.model.state_dict().items())
