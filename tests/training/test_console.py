"""What a person sees of a run while it goes on."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import figures, options

from veneer.models.load import Base, load_base
from veneer.training import train
from veneer.training.run.console import Console

SPEED = r"[\d,]+ tokens/s  lr \d\.\d\de-\d\d  \d\.\d\d GB"


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_live_line(place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step overwrites the line of the one before: a bar, the loss and later the time left; it is erased at the end."""
    monkeypatch.setenv("COLUMNS", "140")
    screen = Terminal()
    train(options(place, tmp_path / "a", steps=4, valid=(place / "valid.jsonl",)), base=base, console=Console(screen))
    assert "step 0: evaluated 5 of 5 examples" in screen.getvalue()
    shown = [part for part in re.split(r"[\r\n]", screen.getvalue()) if re.search(r" step \d+/", part)]
    assert [part.split(" %  ")[1].split("  ")[0] for part in shown] == [f"step {k}/4" for k in (1, 2, 3, 4)]
    assert [part.split(" %")[0][-3:] for part in shown] == [" 25", " 50", " 75", "100"]
    assert all(re.search(SPEED, part) for part in shown)
    assert "left" not in shown[0] and all(" s left  " in part for part in shown[1:])
    assert screen.getvalue().count("\n") < 9


def test_elsewhere_there_are_plain_lines(place: Path, base: Base, tmp_path: Path) -> None:
    """Without a terminal the first and the last step are lines of their own, without control characters."""
    screen = io.StringIO()
    train(options(place, tmp_path / "a", steps=4), base=base, console=Console(screen))
    lines = screen.getvalue().splitlines()
    assert "\r" not in screen.getvalue() and "\x1b" not in screen.getvalue()
    assert any(re.match(rf"step 1/4  loss \d\.\d{{4}}  {SPEED}$", line) for line in lines)
    assert any(re.match(rf"step 4/4  loss \d\.\d{{4}}  0 s left  {SPEED}$", line) for line in lines)


def test_a_base_that_runs_padded_says_so_and_trains(place: Path, tmp_path: Path) -> None:
    """BLOOM does not follow flat batches: the run says that its rows are padded, and learns."""
    tiny("bloom").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), dtype="float32")
    screen, out = io.StringIO(), tmp_path / "a"
    train(options(place, out, name="a", lora_dropout=0.0, steps=12), base=base, console=Console(screen))
    assert screen.getvalue().count("rows are padded: ") == 1
    losses = [line["loss"] for line in figures(out / "metrics" / "a.jsonl") if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
