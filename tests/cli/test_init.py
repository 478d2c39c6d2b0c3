"""``veneer init`` writes options that ``veneer train`` takes, from flags and from answers on a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.cli.main import main
from veneer.config import TrainOptions, resolve
from veneer.training.run.jobs import expand

ROW = '{"prompt": "2 + 2?", "completion": "4"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file of examples."""
    monkeypatch.chdir(tmp_path)
    Path("rows: a.jsonl").write_text(ROW, encoding="utf-8")
    Path("rows.jsonl").write_text(ROW, encoding="utf-8")
    return tmp_path


@pytest.fixture
def type_answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Answer questions as a user on a terminal would."""

    def answer(*lines: str) -> None:
        terminal = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("veneer.cli.init.is_terminal", lambda stream: True)

    return answer


def test_flags_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """With flags nothing is asked; the file holds what they say, and the next commands are printed."""
    assert main(["init", "--data", "rows: a.jsonl", "--method", "dora", "--name", "style"]) == 0
    options, _ = resolve(TrainOptions, "run.yaml")
    assert (options.data, options.method, options.out) == ((Path("rows: a.jsonl"),), "dora", Path("runs/style"))
    assert (options.valid_fraction, options.base) == (0.1, "smollm2-135m")
    assert "veneer train run.yaml" in capsys.readouterr().out


def test_questions_are_asked_again(type_answers: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """An empty line takes the default, a wrong answer is asked again, and both methods become two jobs."""
    type_answers("", "rows.jsonl", "", "qlora", "both", "first")
    assert main(["init"]) == 0
    options, _ = resolve(TrainOptions, "run.yaml")
    assert {job.method for job in expand(options).values()} == {"lora", "dora"}
    assert "please answer lora or dora or both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl"),
        ([], "give --data"),
    ],
)
def test_nothing_is_written_where_an_answer_is_wrong(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file and a missing answer are errors, and no file is left."""
    assert main(["init", *words]) in (1, 2)
    assert expected in capsys.readouterr().err
    assert list(Path().glob("*.yaml")) == []


def test_a_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    """An existing file is kept."""
    Path("run.yaml").write_text("r: 3\n", encoding="utf-8")
    assert main(["init", "--data", "rows.jsonl"]) == 2
    assert Path("run.yaml").read_text(encoding="utf-8") == "r: 3\n"
    assert "exists already" in capsys.readouterr().err
