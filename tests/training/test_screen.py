"""Progress on a terminal and elsewhere, and the plot of the losses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from veneer._terminal import bar, fitted, status, wrapped
from veneer.errors import VeneerError
from veneer.training import train
from veneer.training.loss_plot import PLOT, write_loss_plot
from veneer.training.run.console import Console
from veneer.training.run.recorder import _change


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "20")


def test_a_terminal_shows_a_bar_and_complete_parts() -> None:
    """The bar comes first; parts that do not fit are left out, the last ones first, and none is cut."""
    stream = Terminal()
    console = Console(stream)
    console.advance(0.5)
    console.progress("step 5/10  loss 1.2345  3 min left  1,234 tokens/s  lr 1.00e-04")
    shown = stream.getvalue().strip("\r ")
    assert shown == "##########----------  50 %  step 5/10  loss 1.2345"
    console.line("done")
    assert stream.getvalue().endswith("\rdone\n")


def test_elsewhere_lines_are_plain() -> None:
    """Without a terminal there is no bar and no control character, and every part is there."""
    stream = io.StringIO()
    console = Console(stream)
    console.advance(0.1)
    console.progress("step 1/10  loss 1.2345  lr 1.00e-04", important=True)
    assert stream.getvalue() == "step 1/10  loss 1.2345  lr 1.00e-04\n"


def test_an_error_does_not_stand_behind_the_live_line(tmp_path: Path) -> None:
    """The line that says what is loading is erased before an error is raised."""
    stream = Terminal()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    options = {"data": [str(tmp_path / "rows.jsonl")], "base": str(tmp_path / "none"), "out": str(tmp_path / "run")}
    with pytest.raises(VeneerError):
        train(options, console=Console(stream))
    assert "loading" in stream.getvalue() and stream.getvalue().endswith(" \r")


@pytest.mark.parametrize("text", ["word " * 40, "  - " + "a-hyphenated-word " * 20, "x" * 200, "short"])
def test_lines_are_broken_between_words(text: str) -> None:
    """On a terminal no word is broken at the end of a line; elsewhere the text is unchanged."""
    assert wrapped(text, io.StringIO()) == text
    lines = wrapped(text, Terminal()).splitlines()
    assert " ".join(lines).split() == text.split()
    assert all(len(line) < 60 or len(line.split()) == 1 for line in lines)


def test_pieces_of_the_terminal() -> None:
    """A bar stays within its width, and a line without room for two parts keeps the first."""
    assert bar(0, 4) == "----   0 %" and bar(2, 4) == "#### 100 %" and bar(0.26, 4).startswith("#---")
    assert fitted(["abcdef", "gh"], 4) == "abcd" and fitted(["ab", "cd"], 6) == "ab  cd"


def test_a_status_is_shown_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is there while the work is done, and nothing of it stays, even after an error; elsewhere nothing is printed."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)

    def fail() -> None:
        assert stream.getvalue() == "loading ..."
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        status("loading")(fail)()
    assert stream.getvalue().endswith("\r" + " " * 11 + "\r")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with status("loading"):
        pass
    import sys

    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_change_that_says_nothing_is_said_in_words() -> None:
    """Percentages that would be -100.0 or 0.0 are words."""
    assert _change([(0, 2.0)]) == "" and _change([(0, 2.0), (1, 1.0)]) == " (-50.0 %)"
    assert _change([(0, 2.0), (1, 1e-5)]) == " (close to 0)"
    assert _change([(0, 2.0), (1, 2.0002)]) == " (unchanged)"
    assert _change([(0, float("nan")), (1, 1.0)]) == ""


def write_metrics(out: Path, **jobs: list[dict[str, object]]) -> None:
    (out / "metrics").mkdir(parents=True)
    for name, rows in jobs.items():
        (out / "metrics" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo'
        )


@pytest.mark.parametrize(
    "jobs",
    [
        {"a": [{"step": s, "loss": 2.0 / s} for s in range(1, 2000)]},
        {"a": [{"step": 0, "held_out_loss": 1.0}], "b": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]},
        {f"job-{n} <&>".replace("<&>", "x"): [{"step": 3, "loss": 1e-9}, {"step": 4, "loss": 1e6}] for n in range(9)},
    ],
)
def test_losses_are_drawn(tmp_path: Path, jobs: dict[str, list[dict[str, object]]]) -> None:
    """The plot is well-formed and small, with a line per job that has training losses, inside the picture."""
    write_metrics(tmp_path, **jobs)
    assert write_loss_plot(tmp_path) == tmp_path / PLOT
    text = (tmp_path / PLOT).read_text()
    tree = ElementTree.fromstring(text)
    lines = tree.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == sum(any("loss" in row for row in rows) for rows in jobs.values()) and len(text) < 200_000
    for point in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(line.get("points", "") for line in lines)):
        assert 0 <= float(point[0]) <= 720 and 0 <= float(point[1]) <= 400


def test_a_run_without_losses_has_no_plot(tmp_path: Path) -> None:
    """Nothing is written before the first loss."""
    write_metrics(tmp_path, a=[{"step": 0}, {"step": 1, "loss": float("nan")}])
    assert write_loss_plot(tmp_path) is None and not (tmp_path / PLOT).exists()
