"""``veneer data check`` and ``veneer data show``, from the words on the command line to the exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import tiny, tiny_tokenizer

from veneer.cli.main import main

Run = Callable[..., tuple[int, str, str]]
GOOD = '{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}\n'
BAD = '{"messages": [{"role": "user", "content": "ask"}, {"role": "asistant", "content": "answer"}]}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a data command on the tiny base, in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["data", *words, "--base", str(base)])
        return (code, *capsys.readouterr())

    return call


def test_check_ends_with_zero_for_a_good_file(run: Run) -> None:
    """All rows usable: exit code 0, and the last line says so."""
    Path("rows.jsonl").write_text(GOOD, encoding="utf-8")
    code, out, err = run("check", "rows.jsonl")
    assert (code, err) == (0, "") and out.endswith("All rows can be trained.\n")


def test_check_ends_with_one_for_an_unusable_row(run: Run) -> None:
    """One unusable row: exit code 1, its place, key and remedy."""
    Path("rows.jsonl").write_text(GOOD + BAD, encoding="utf-8")
    code, out, _ = run("check", "rows.jsonl")
    assert code == 1 and "rows.jsonl:2: messages[1].role: expected" in out and "did you mean assistant?" in out
    code, out, _ = run("check", "rows.jsonl", "--json")
    assert code == 1 and json.loads(out)["bad_rows"]["count"] == 1


def test_check_judges_lengths_by_the_base(run: Run) -> None:
    """Without a length of its own the check takes the base's context, as training does, and counts what is behind it."""
    Path("rows.jsonl").write_text(GOOD + GOOD.replace("answer", "answer " * 400), encoding="utf-8")
    code, out, _ = run("check", "rows.jsonl", "--json")
    report = json.loads(out)
    assert (code, report["max_length"], report["truncated_rows"]) == (0, 256, 1)
    assert report["lost_trained_tokens"] > 100


def test_check_compares_with_held_out_rows(run: Run, tmp_path: Path) -> None:
    """Held-out rows come from a flag or from a folder's valid file."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD, encoding="utf-8")
    for words in (["train.jsonl", "--valid", "valid.jsonl"], ["."]):
        code, out, _ = run("check", *words, "--json")
        assert code == 0 and json.loads(out)["findings"]["overlap"]["rows"] == 1


def test_columns_and_formats_are_taken_from_flags(run: Run) -> None:
    """Without the map the error names it; with it the rows are read."""
    Path("rows.csv").write_text("question,answer\nask,answer\n", encoding="utf-8")
    code, _, err = run("check", "rows.csv")
    assert code == 1 and "--columns prompt=question,completion=answer" in err and err.count("\n") == 1
    code, out, _ = run("check", "rows.csv", "--columns", "prompt=question,completion=answer")
    assert code == 0 and "prompt is column question" in out
    assert run("check", "rows.csv", "--columns", "prompt")[0] == 2
    assert run("check", "rows.csv", "--format", "alpaka")[0] == 2


def test_show_marks_what_is_trained(run: Run) -> None:
    """The first rows with their trained tokens between brackets, and how many there are."""
    Path("rows.jsonl").write_text(GOOD * 5, encoding="utf-8")
    code, out, _ = run("show", "rows.jsonl", "-n", "2", "--skip", "1")
    assert code == 0 and out.count("[[answer<|im_end|>]]") == 2
    assert "rows.jsonl:2: trained" in out and "rows.jsonl:4" not in out
    code, out, _ = run("show", "rows.jsonl", "--ids", "-n", "1")
    assert code == 0 and out.count(" + ") == int(out.split("trained ")[1].split(" of")[0])


def test_show_writes_a_page(run: Run, tmp_path: Path) -> None:
    """The page is written whole under its name and nothing else is left."""
    Path("rows.jsonl").write_text(GOOD, encoding="utf-8")
    code, out, _ = run("show", "rows.jsonl", "--html", "rows.html")
    assert code == 0 and out == "rows.html: 1 example\n"
    assert Path("rows.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    code, _, err = run("show", "rows.jsonl", "--html", "nowhere/rows.html")
    assert code == 1 and "cannot be written" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.html", "rows.jsonl"]


def test_show_tells_unusable_rows(run: Run) -> None:
    """A row among the shown that cannot be used is told with its reason, and the exit code is 1."""
    Path("rows.jsonl").write_text(GOOD + BAD, encoding="utf-8")
    code, out, _ = run("show", "rows.jsonl")
    assert code == 1 and "unusable: rows.jsonl:2: messages[1].role" in out and "[[answer" in out


def test_a_template_from_a_file(run: Run) -> None:
    """Another chat template takes the place of the base's."""
    Path("rows.jsonl").write_text(GOOD, encoding="utf-8")
    template = "{% for m in messages %}{{ m.role + '=' + m.content + '<|im_end|>' }}{% endfor %}"
    Path("plain.jinja").write_text(template + "{% if add_generation_prompt %}assistant={% endif %}", encoding="utf-8")
    code, out, _ = run("show", "rows.jsonl", "--chat-template", "plain.jinja")
    assert code == 0 and "user=ask<|im_end|>assistant=[[answer<|im_end|>]]" in out
    code, _, err = run("show", "rows.jsonl", "--chat-template", "nowhere.jinja")
    assert code == 1 and "no such file" in err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("check", "nowhere.jsonl"), 1),
        (("show", "nowhere.jsonl"), 1),
        (("show", "rows.jsonl", "-n", "0"), 2),
        (("show", "rows.jsonl", "--skip", "9"), 1),
        (("check", "rows.jsonl", "--max-length", "1"), 2),
        (("check", "rows.jsonl", "--roles", "x"), 2),
    ],
)
def test_mistakes_are_one_line_and_a_code(run: Run, words: tuple[str, ...], code: int) -> None:
    """A missing file is 1, a wrong flag 2; one line each, no traceback."""
    Path("rows.jsonl").write_text(GOOD, encoding="utf-8")
    found, _, err = run(*words)
    assert found == code and err.startswith("veneer: error: ") and err.count("\n") == 1


def test_a_wrong_column_is_reported_before_the_heavy_imports(tmp_path: Path) -> None:
    """Neither torch nor transformers is imported to say that a column is unknown, for training and held-out rows."""
    (tmp_path / "rows.csv").write_text("frage,antwort\na,b\n", encoding="utf-8")
    (tmp_path / "good.jsonl").write_text(GOOD, encoding="utf-8")
    script = (
        "import sys; from veneer.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, *({'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
    )
    for words in (["rows.csv"], ["rows.csv", "--columns", "prompt=x"], ["good.jsonl", "--valid", "rows.csv"]):
        command = [sys.executable, "-c", script, "data", "check", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "1\n" and "frage" in done.stderr


def test_the_base_s_embedding_bounds_the_tokens(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token that was added to the tokenizer only makes the row unusable in check and show."""
    folder = tmp_path / "grown"
    shutil.copytree(base, folder)
    tokenizer = tiny_tokenizer()
    size = tiny("llama").config.vocab_size
    tokenizer.add_tokens([f"[NEW{i}]" for i in range(size + 1 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    last = f"[NEW{size - len(tiny_tokenizer())}]"
    (tmp_path / "rows.jsonl").write_text(GOOD.replace("answer", last) + GOOD, encoding="utf-8")
    for command in ("check", "show"):
        code = main(["data", command, str(tmp_path / "rows.jsonl"), "--base", str(folder)])
        assert code == 1 and f"rows.jsonl:1: messages: token {size} ('{last}')" in capsys.readouterr().out


def test_show_warns_of_what_the_template_leaves_out(run: Run) -> None:
    """Tools that the template does not render are told below the rows; a template that renders them is chosen by name."""
    row = json.loads(GOOD) | {
        "tools": [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
    }
    Path("rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    code, out, _ = run("show", "rows.jsonl")
    assert code == 0 and "warning: the chat template does not render the tools" in out and ": 1 (rows.jsonl:1)" in out
    code, out, _ = run("show", "rows.jsonl", "--chat-template", "chatml-tools", "--max-length", "2000")
    assert code == 0 and '"name": "weather"' in out and "warning" not in out
