"""``veneer export``: GGUF files, Ollama folders and model cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.checkpoints.test_gguf import what_llama_adds
from tests.compose.made import METHODS, saved, trained
from tests.tiny import tiny_tokenizer

from veneer.checkpoints import attach, read_adapter
from veneer.cli.main import main

SITE = "model.layers.1.mlp.up_proj"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base and three adapters of it."""
    bank = attach(saved(tmp_path / "base"))
    receipt = {"data_sha256": "ab" * 32, "steps": 12}
    for seed, name in enumerate(("lora", "rslora", "dora")):
        bank.insert(trained(saved(tmp_path / "twin"), METHODS[name], name=name, seed=seed))
        bank.save(name, tmp_path / name, base_name=str(tmp_path / "base"), receipt=receipt)
    return tmp_path


def test_gguf_of_adapters_and_mixes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA folder is written as it is; a mix of LoRA is exact; DoRA is refused, or approximated with its error told."""
    assert main(["export", f"{made}/rslora", "--to", "gguf", "--out", f"{made}/a.gguf"]) == 0
    assert "--lora" in capsys.readouterr().out
    one, other = read_adapter(made / "lora"), read_adapter(made / "rslora")
    found = what_llama_adds(made / "a.gguf", "blk.1.ffn_up.weight")
    assert torch.allclose(found, other.delta_2d(SITE).double(), rtol=1e-5, atol=1e-7)
    assert main(["export", f"{made}/lora:0.5", f"{made}/rslora:-1", "--to", "gguf", "--out", f"{made}/b.gguf"]) == 0
    found = what_llama_adds(made / "b.gguf", "blk.1.ffn_up.weight")
    assert torch.allclose(found, (0.5 * one.delta_2d(SITE) - other.delta_2d(SITE)).double(), rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert main(["export", f"{made}/dora", "--to", "gguf", "--out", f"{made}/c.gguf"]) == 1
    assert "give --rank R for its best approximation" in capsys.readouterr().err
    assert main(["export", f"{made}/dora", "--to", "gguf", "--rank", "8", "--out", f"{made}/c.gguf", "--json"]) == 0
    assert 0.01 < json.loads(capsys.readouterr().out)["error"] < 1


def test_vllm_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DoRA and mixes become plain LoRA folders that PEFT reads, with the error and the command that serves them."""
    words = [f"{made}/lora:0.5", f"{made}/rslora:-1"]
    assert main(["export", *words, "--to", "vllm", "--out", f"{made}/mix"]) == 0
    mix = read_adapter(made / "mix")
    one, other = read_adapter(made / "lora"), read_adapter(made / "rslora")
    assert torch.allclose(mix.delta_2d(SITE), 0.5 * one.delta_2d(SITE) - other.delta_2d(SITE), rtol=1e-4, atol=1e-6)
    assert f"--enable-lora --max-lora-rank 16 --lora-modules mix={made}/mix" in capsys.readouterr().out
    assert main(["export", f"{made}/dora", "--to", "vllm", "--out", f"{made}/plain"]) == 1
    assert "give --rank R" in capsys.readouterr().err
    assert main(["export", f"{made}/dora", "--to", "vllm", "--rank", "12", "--out", f"{made}/plain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = json.loads((made / "plain" / "adapter_config.json").read_text(encoding="utf-8"))
    assert 0.01 < report["error"] < 1 and "--max-lora-rank 16" in report["command"]
    assert not config.get("use_dora") and config["r"] == 12


def test_ollama_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Modelfile names the base and the file beside it; without a GGUF base the base's name must be given."""
    words = ["export", f"{made}/lora", "--to", "ollama", "--out", f"{made}/o"]
    assert main(words) == 2
    assert "for Ollama with --from" in capsys.readouterr().err and not (made / "o").exists()
    assert main([*words, "--from", "tiny-llama", "--dtype", "f16"]) == 0
    assert (made / "o" / "Modelfile").read_text() == "FROM tiny-llama\nADAPTER ./adapter.gguf\n"
    assert (made / "o" / "adapter.gguf").is_file() and "note:" not in capsys.readouterr().out
    assert main([*words[:-1], f"{made}/p", "--from", "a\nSYSTEM b"]) == 2


def test_stop_tokens_are_passed_on(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Modelfile, llama.cpp's options and the card have the tokens that the adapter's answers end with; composing keeps them."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(made / "base")
    bank = attach(saved(made / "twin", eos_token_id=0))
    receipt = {"stop_tokens": {"<|im_end|>": 2}}
    for name, adapter in (("x", "lora"), ("y", "rslora")):
        bank.load(made / adapter, name=name)
        bank.save(
            name, made / name, base_name=str(made / "base"), receipt=receipt, template="{{ messages[0].content }}"
        )
    end = "`<|im_end|>` (2). Tell programs that only know the base: `eos_token_id=[2]`"
    assert end in (made / "x" / "README.md").read_text()
    assert main(["compose", f"{made}/x:0.5", f"{made}/y:0.5", "--out", f"{made}/xy"]) == 0
    assert end in (made / "xy" / "README.md").read_text()
    (made / "base" / "generation_config.json").write_text('{"eos_token_id": 0}')
    for given in ("x", "xy"):
        assert main(["export", f"{made}/{given}", "--to", "ollama", "--from", "m", "--out", f"{made}/o-{given}"]) == 0
        lines = (made / f"o-{given}" / "Modelfile").read_text().splitlines()
        assert lines[2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']
        capsys.readouterr()
        assert main(["export", f"{made}/{given}", "--to", "gguf", "--out", f"{made}/{given}.gguf"]) == 0
        out = capsys.readouterr().out
        assert "add --override-kv tokenizer.ggml.eot_token_id=int:2" in out and "chat template in its folder" in out
    # Without a record, the end of the template stands in.
    assert main(["export", f"{made}/lora", "--to", "ollama", "--from", "m", "--out", f"{made}/o-lora"]) == 0
    assert 'PARAMETER stop "<|im_end|>"' in (made / "o-lora" / "Modelfile").read_text()


def test_cards(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A card has the base, data hash, figures and command, and says of a composition what it was made from."""
    run = made / "run"
    (run / "metrics").mkdir(parents=True)
    (run / "config.yaml").write_text("data: x.jsonl\n")
    (run / "metrics" / "lora.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 1.5, "time": 5}\n')
    assert main(["export", f"{made}/lora", "--to", "card", "--run", str(run), "--out", f"{made}/card.md"]) == 0
    card = (made / "card.md").read_text()
    for part in ("base_model:", "ab" * 32, "| loss | 1.5 |", "| step | 2 |", "veneer train", "library_name: peft"):
        assert part in card, part
    assert main(["compose", f"{made}/lora:0.5", f"{made}/rslora", "--out", f"{made}/mix"]) == 0
    assert main(["export", f"{made}/mix", "--to", "card", "--out", f"{made}/mix.md"]) == 0
    text = (made / "mix.md").read_text()
    assert "- lora x 0.5, tensors `" in text and "operation sum" in text
    capsys.readouterr()
    for words, says, code in (
        (["lora", "dora", "--to", "card"], "a model card describes one adapter", 2),
        (["lora", "--to", "card", "--run", str(made)], "not a run", 2),
        (["lora", "--to", "gguf", "--rank", "0"], "--rank: expected at least 1", 2),
    ):
        words = [str(made / w) if w in ("lora", "dora") else w for w in words]
        assert main(["export", *words, "--out", f"{made}/x"]) == code
        assert says in capsys.readouterr().err
    assert main(["export", f"{made}/lora", "--to", "card", "--out", f"{made}/card.md"]) == 1
    assert "is a file;" in capsys.readouterr().err
