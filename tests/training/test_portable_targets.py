"""A run says before its first step which layers it leaves out, or which other programs cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.checkpoints.architectures import build, logits
from tests.checkpoints.helpers import load_peft
from tests.tiny import tiny_tokenizer
from tests.training.made import write_rows

from veneer.cli.main import main


@pytest.mark.parametrize(
    ("arch", "options", "says"),
    [
        ("falcon_h1", [], "all-linear leaves out out_proj (2 layers): PEFT refuses such layers in falcon_h1 models; "),
        (
            "deepseek_v3",
            ["--method", "dora", "--exclude-modules", "experts"],
            "all-linear leaves out down_proj (2 layers), gate_proj (2 layers), up_proj (2 layers): PEFT adapts such layers",
        ),
        (
            "mamba",
            ["--target-modules", "in_proj,out_proj"],
            "PEFT cannot read this adapter at out_proj (2 layers): PEFT refuses such layers in mamba models; targets that it reads: "
            "--target-modules in_proj",
        ),
        ("deepseek_v3", [], ""),
        (
            "gpt_oss",
            ["--method", "dora"],
            "PEFT cannot read this adapter at down_proj (8 layers), gate_proj (8 layers), up_proj",
        ),
        ("deepseek_v3", ["--exclude-modules", "experts"], ""),
    ],
)
def test_a_run_says_so_before_it_starts(
    arch: str, options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The note stands above the first step, and what the default targets leave is a folder that PEFT reads."""
    build(arch, max_position_embeddings=256).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows, out = write_rows(tmp_path / "train.jsonl", 4), tmp_path / "out"
    words = [
        "train",
        str(rows),
        "--base",
        str(tmp_path / "base"),
        "--out",
        str(out),
        "--steps",
        "1",
        "--batch-size",
        "2",
    ]
    assert main([*words, "--dtype", "float32", "--compile", "false", *options]) == 0
    printed = capsys.readouterr().out
    before, step, _ = printed.partition("step 1/1")
    assert step and (f"note: {says}" in before if says else "PEFT" not in printed)
    if "PEFT cannot" not in says:
        logits(load_peft(build(arch, max_position_embeddings=256), out / "adapter"))
