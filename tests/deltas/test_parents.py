"""Adapters that are put together, or merged: held against each other's bases, and against the numbers in their receipts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.compose.made import METHODS, saved, trained
from tests.tiny import tiny_tokenizer

from veneer.adapters import LoRA
from veneer.checkpoints import attach, read_adapter, write_adapter
from veneer.cli.main import main
from veneer.errors import CheckpointError
from veneer.models.load import load_base


def written(
    folder: Path, base: Path, name: str, method: str = "lora", *, seed: int = 0, template: str | None = None
) -> Path:
    """A trained adapter's folder with a receipt of the base in a folder."""
    model = load_base(base, dtype="auto").model
    bank = attach(model)
    bank.insert(trained(model, METHODS[method], name=name, seed=seed))
    known = {"template_sha256": f"hash of {template}"} if template else {}
    bank.save(name, folder / name, base_name=str(base), receipt=known, template=template or None)
    bank.detach()
    return folder / name


def relative(folder: Path, by: float) -> Path:
    """The base of a folder with every weight moved a little: another revision."""
    model = saved(folder / "unused")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(by * value.norm() / value.numel() ** 0.5 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / "relative")
    return folder / "relative"


@pytest.mark.parametrize("by", [0.001, 0.03])
def test_a_revision_of_the_base_is_another_base(by: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that differ by a thousandth are seen by merge and compose, which say so and can be told to go on."""
    saved(tmp_path / "base")
    a = written(tmp_path, tmp_path / "base", "a")
    other = relative(tmp_path, by)
    b = written(tmp_path, other, "b", seed=1)
    assert main(["merge", str(a), "--base", str(other), "--out", str(tmp_path / "m"), "--no-probe"]) == 1
    assert "was made on another base than" in capsys.readouterr().err
    assert main(["compose", str(a), str(b), "--out", str(tmp_path / "c")]) == 1
    assert "were made on different bases" in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not (tmp_path / "c").exists()
    forced = ["--force", "base"]
    assert main(["merge", str(a), "--base", str(other), "--out", str(tmp_path / "m"), "--no-probe", *forced]) == 0
    assert main(["compose", str(a), str(b), "--out", str(tmp_path / "c"), *forced]) == 0


def test_bases_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters that name different bases are not put together where they share no layer by which to compare these; where they do and have
    no receipts, the report says that nothing tells."""
    model = saved(tmp_path / "base")
    for name, targets, base in (("q", "q_proj", "org/one"), ("v", "v_proj", "org/two"), ("w", "q_proj", "org/two")):
        adapter = trained(model, LoRA(r=2, target_modules=(targets,)), name=name)
        write_adapter(adapter, tmp_path / name, base_name=base)
    words = ["compose", str(tmp_path / "q"), str(tmp_path / "v"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "name different bases (org/one and org/two)" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--force", "base"]) == 0
    assert main(["compose", str(tmp_path / "q"), str(tmp_path / "w"), "--out", str(tmp_path / "same")]) == 0
    assert "the parents name different bases (org/one, org/two)" in capsys.readouterr().out


def test_one_base_in_two_precisions_is_one_base(tmp_path: Path) -> None:
    """Adapters that were trained on the fp32 and the bf16 form of the same weights go together."""
    saved(tmp_path / "wide", dtype=torch.bfloat16).float().save_pretrained(tmp_path / "wide")
    saved(tmp_path / "narrow", dtype=torch.bfloat16)
    a = written(tmp_path, tmp_path / "wide", "a")
    b = written(tmp_path, tmp_path / "narrow", "b", seed=1)
    assert main(["compose", str(a), str(b), "--out", str(tmp_path / "c")]) == 0
    assert main(["merge", str(b), "--base", str(tmp_path / "wide"), "--out", str(tmp_path / "m"), "--no-probe"]) == 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_scale_that_was_altered_is_not_merged(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora_alpha edited after training: the probes in the receipt tell, with DoRA too, whose change needs the base."""
    saved(tmp_path / "base")
    a = written(tmp_path, tmp_path / "base", "a", method)
    command = ["merge", str(a), "--no-probe", "--allow-rounding"]
    assert main([*command, "--out", str(tmp_path / "m")]) == 0
    path = a / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 80}))
    assert main([*command, "--out", str(tmp_path / "n")]) == 1
    assert "adapter_config.json was altered after training" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_a_pissa_folder_is_written_as_the_change_that_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused as it is with the command that converts it; the converted folder computes the same, and merges."""
    from tests.checkpoints.helpers import load_peft, outputs, peft_model, save_peft

    saved(tmp_path / "base")
    load = lambda: load_base(tmp_path / "base", dtype="float32").model  # noqa: E731
    theirs = peft_model(load(), target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "pissa")
    base = ["--base", str(tmp_path / "base")]
    assert main(["merge", str(tmp_path / "pissa"), *base, "--out", str(tmp_path / "m")]) == 1
    assert "veneer export FOLDER --to peft --base MODEL --out NEW" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "pissa"), "--to", "peft", *base, "--out", str(tmp_path / "new")]) == 0
    assert (outputs(load_peft(load(), tmp_path / "new")) - expected).abs().max() <= 2e-5
    assert main(["merge", str(tmp_path / "new"), *base, "--out", str(tmp_path / "m"), "--dtype", "float32"]) == 0
    assert (outputs(load_base(tmp_path / "m", dtype="float32").model) - expected).abs().max() <= 2e-5
    assert main(["export", f"{tmp_path / 'new'}:0.5", "--to", "peft", *base, "--out", str(tmp_path / "o")]) == 2


def test_what_parents_agree_on_is_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A composed folder has its parents' chat template and its hash where they are of one; else receipt, card and report say which differ.
    Its DoRA change has probes, so that settings which are altered afterwards are seen."""
    saved(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, method, template in (("a", "lora", "one"), ("b", "dora", "one"), ("c", "lora", "two"), ("d", "lora", "")):
        written(tmp_path, tmp_path / "base", name, method, template=template)
    parents = [str(tmp_path / name) for name in "abcd"]
    assert main(["compose", *parents[:2], "--out", str(tmp_path / "same")]) == 0
    same = read_adapter(tmp_path / "same")
    receipt = same.meta["receipt"]
    assert receipt["template_sha256"] == "hash of one" and same.meta["template"] == "one" and "notes" not in receipt
    assert set(receipt["probes"]) == set(same.tensors)
    bank = attach(load_base(tmp_path / "base", dtype="float32").model)
    bank.load(tmp_path / "same", name="same")
    config = tmp_path / "same" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"lora_alpha": {same.method.lora_alpha:g}', '"lora_alpha": 3'))
    with pytest.raises(CheckpointError, match="altered after training"):
        bank.load(tmp_path / "same", name="again")
    capsys.readouterr()
    for other, recorded in (("c", "hash of two"), ("d", "not recorded")):
        out = tmp_path / f"a{other}"
        assert main(["compose", parents[0], str(tmp_path / other), "--out", str(out)]) == 0
        note = f"different chat templates or tokenizers (a: hash of one, {other}: {recorded[:12]})"
        receipt = read_adapter(out).meta["receipt"]
        assert "template_sha256" not in receipt and not (out / "chat_template.jinja").exists()
        assert note in receipt["notes"][0] and note in (out / "README.md").read_text()
        assert note in capsys.readouterr().out


@pytest.mark.parametrize("command", ["extract", "reduce"])
def test_dora_that_is_made_has_probes(tmp_path: Path, command: str) -> None:
    """DoRA folders that are extracted, or have their intruders scaled down, record what their change is."""
    model = saved(tmp_path / "base")
    a = written(tmp_path, tmp_path / "base", "a", "dora")
    out = str(tmp_path / "out")
    if command == "extract":
        for value in model.parameters():
            value.data.mul_(1 + 0.1 * torch.rand(value.shape))
        model.save_pretrained(tmp_path / "tuned")
        words = ["extract", "--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--rank", "4"]
        assert main([*words, "--method", "dora", "--out", out]) == 0
    else:
        assert main(["inspect", str(a), "--reduce-intruders", out, "--threshold", "1", "--top-k", "2"]) == 0
    made = read_adapter(out)
    assert made.method.needs_base_weights and set(made.meta["receipt"]["probes"]) == set(made.tensors)
    attach(load_base(tmp_path / "base", dtype="float32").model).load(out, name="made")
