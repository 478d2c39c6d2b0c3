"""``veneer merge`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints.architectures import build
from tests.compose.made import saved, trained
from tests.tiny import tiny_tokenizer
from transformers import GenerationConfig

from veneer.adapters import LoRA
from veneer.checkpoints import read_adapter, write_adapter
from veneer.cli._parents import parse_mix
from veneer.cli.main import main
from veneer.cli.merge import parse_size
from veneer.errors import ConfigError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base in bf16 and two adapters, one of them too small for bf16."""
    model = saved(tmp_path / "base", dtype=torch.bfloat16)
    for name, size in (("big", 0.1), ("small", 0.001)):
        adapter = trained(model.float(), LoRA(r=4, lora_alpha=4), name=name, size=size)
        write_adapter(adapter, tmp_path / name, base_name=str(tmp_path / "base"))
    return tmp_path


def test_merge_and_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mix is merged into the base that the folders name; the report says what was kept and how far the logits are."""
    assert main(["merge", f"{made}/big:0.7,{made}/small:0.3", "--out", f"{made}/out", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(p["name"], p["weight"]) for p in report["parents"]] == [("big", 0.7), ("small", 0.3)]
    assert 0.95 < report["kept"] < 1.05 and report["logits"]["merged"] < report["logits"]["change"]
    assert json.loads((made / "out" / "merge_report.json").read_text()) == report
    assert main(["merge", f"{made}/big", "--out", f"{made}/plain", "--sites", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is kept" in lines[1] and lines[3].startswith("least accurate sites") and lines[6] == ""
    assert any(line.startswith("logits: at most") for line in lines)


def test_a_merged_model_stops_where_its_adapter_does(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generation_config.json has the adapter's stop tokens beside the base's own, and says so; nothing changes where it has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(made / "base")
    own = {"eos_token_id": 0, "temperature": 0.5, "do_sample": True}
    (made / "base" / "generation_config.json").write_text(json.dumps(own))
    adapter = read_adapter(made / "big")
    write_adapter(
        adapter, made / "taught", base_name=str(made / "base"), receipt={"stop_tokens": {"[x]": 7, "<|im_end|>": 2}}
    )
    for name, ends in (
        ("taught", [0, 2]),
        ("big", [0, 2]),
    ):  # the second by the template, which ends turns with <|im_end|>
        assert main(["merge", f"{made}/{name}", "--out", f"{made}/m-{name}", "--no-probe"]) == 0
        assert "generation also stops at <|im_end|>" in capsys.readouterr().out
        found = GenerationConfig.from_pretrained(made / f"m-{name}")
        assert found.eos_token_id == ends and found.temperature == 0.5
    (made / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert main(["merge", f"{made}/taught", "--out", f"{made}/same", "--no-probe"]) == 0
    assert "also stops" not in capsys.readouterr().out
    assert (made / "same" / "generation_config.json").read_text() == '{"eos_token_id": [2, 0]}'
    (made / "base" / "generation_config.json").unlink()
    (made / "base" / "tokenizer.json").unlink()  # the record alone
    assert main(["merge", f"{made}/taught", "--out", f"{made}/bare", "--no-probe"]) == 0
    assert json.loads((made / "bare" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


def test_rounding_away_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal is one sentence with exit code 1 and nothing written; each way out that it names works."""
    command = ["merge", f"{made}/small", "--out", f"{made}/out"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("veneer: error: this merge would round the fine-tune away")
    assert not (made / "out").exists()
    for number, way in enumerate(
        (["--dtype", "float32"], ["--residual", "16"], ["--rounding", "stochastic"], ["--allow-rounding"])
    ):
        assert main([*command[:-1], f"{made}/out{number}", *way]) == 0
    assert (made / "out1" / "residual" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("scale", [1e-30, 0.0])
def test_an_adapter_that_changes_nothing_is_told(
    scale: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge and a composition say so in a sentence if its factors are too small for any weight; zeros are not composed."""
    adapter = trained(saved(tmp_path / "base"), LoRA(r=2, lora_alpha=4), name="faint")
    for parameter in adapter.parameters():
        parameter.data *= scale
    write_adapter(adapter, tmp_path / "faint", base_name=str(tmp_path / "base"))
    assert main(["merge", str(tmp_path / "faint"), "--out", str(tmp_path / "out"), "--no-probe"]) == 0
    says = "faint: the change " + ("has a norm of at most" if scale else "is zero at every site")
    assert says in capsys.readouterr().err
    code = main(["compose", str(tmp_path / "faint"), "--out", str(tmp_path / "both")])
    assert code == (0 if scale else 1) and (says if scale else "zero") in "".join(capsys.readouterr())


def test_mistakes_are_one_sentence(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing folder, a base in an adapter's place, another base, a taken place, an odd size."""
    other = saved(made / "other", seed=5)
    from veneer.checkpoints import attach

    bank = attach(other)
    bank.insert(trained(other, name="foreign"))
    bank.save("foreign", made / "foreign")
    out = ["--out", f"{made}/out", "--no-probe"]
    for words, says, code in (
        ([f"{made}/nothing", *out], "no such folder", 1),
        ([f"{made}/big:much", *out], "is not a weight", 2),
        ([f"{made}/base", *out], "contains no adapter", 1),
        ([f"{made}/foreign", "--base", f"{made}/base", *out], "was made on another base", 1),
        ([f"{made}/big", "--out", f"{made}/base"], "a folder that is not empty", 1),
        ([f"{made}/big", "--shard-size", "many", *out], "--shard-size", 2),
        ([f"{made}/big", "--residual", "-1", *out], "--residual", 2),
        ([f"{made}/foreign", f"{made}/big", "--base", f"{made}/gone", *out], "neither a file nor a folder", 1),
    ):
        assert main(["merge", *words]) == code, says
        err = capsys.readouterr().err
        assert says in err and "bug in veneer" not in err
        assert not (made / "out").exists()
    assert main(["merge", f"{made}/foreign", "--base", f"{made}/base", "--force", "base", *out]) == 0


def test_mixes_are_read(made: Path) -> None:
    """Weights stand behind the last colon; commas and words separate alike; no number means one."""
    a, b = made / "big", made / "small"
    assert parse_mix([f"{a}:0.7,{b}:-3e-1"]) == [(a, "big", 0.7), (b, "small", -0.3)]
    assert parse_mix([str(a), f"{b}:2"]) == [(a, "big", 1.0), (b, "small", 2.0)]
    with pytest.raises(ConfigError, match="finite"):
        parse_mix([f"{a}:nan"])
    with pytest.raises(ConfigError, match="no adapter given"):
        parse_mix([","])


def test_sizes_are_read() -> None:
    """Sizes of files as people write them."""
    assert [parse_size(text) for text in ("5", "2GB", "1.5 mb", "4GiB", "10K")] == [
        5,
        2 * 10**9,
        1_500_000,
        2**32,
        10_000,
    ]
    for text in ("", "0", "-1", "1TB", "x"):
        with pytest.raises(ConfigError):
            parse_size(text)


@pytest.mark.parametrize("arch", ["gemma3", "llava", "paligemma", "qwen2_5_vl"])
def test_a_merged_multimodal_model_keeps_its_images_part_and_processor(arch: str, tmp_path: Path) -> None:
    """The processor's files are the base's byte for byte, and so are the weights outside the language model; those inside changed."""
    model: Any = build(arch)
    model.save_pretrained(tmp_path / "base")
    beside = {
        "preprocessor_config.json": b'{"do_resize": true}',
        "processor_config.json": b"{}",
        "video_preprocessor_config.json": b"{}\n",
        "chat_template.json": b'{"chat_template": ""}',
    }
    for name, content in beside.items():
        (tmp_path / "base" / name).write_bytes(content)
    language = LoRA(r=2, target_modules=("re:.*language_model.*q_proj",))
    write_adapter(trained(model, language), tmp_path / "a", base_name=str(tmp_path / "base"))
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "merged")]) == 0
    assert {name: (tmp_path / "merged" / name).read_bytes() for name in beside} == beside
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert old.keys() == new.keys()
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert changed and not any("vis" in name or "projector" in name for name in changed)
    assert any("visual" in name or "vision" in name for name in old)
