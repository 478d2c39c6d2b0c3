"""Generate docs/errors.md: twenty common mistakes, each made on a tiny model, with Veneer's messages.

    python -m docs.scripts.errors            write docs/errors.md
    python -m docs.scripts.errors --check    exit 1 if a mistake is no longer refused, or its message differs

Everything happens in a temporary folder on a tiny model; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "errors.md"

_HEAD = """# Common errors

Twenty common mistakes and Veneer's messages. `docs/scripts/errors.py` generates this page by making each mistake on a tiny model; a
test repeats them.
"""


@dataclass(frozen=True)
class Mistake:
    """A mistake: title, command, and words that the message must contain as a remedy."""

    title: str
    command: str
    needs: tuple[str, ...]
    prepare: Callable[[], None] = lambda: None


def rows(path: str, *values: object) -> Callable[[], None]:
    """Write a file of rows."""
    return lambda: (
        Path(path).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8") and None
    )


def text(path: str, value: str) -> Callable[[], None]:
    """Write a text file."""

    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(value, encoding="utf-8")

    return write


def chat(answer: str = "four", question: str = "2 + 2?") -> dict[str, object]:
    """One conversation."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TRAIN = "veneer train rows.jsonl --base ./base --steps 2"
MISTAKES = (
    Mistake("A typo in a target", f"{TRAIN} --target-modules q_porj --out r1", ("q_porj", "q_proj")),
    Mistake(
        "A file with another column name",
        "veneer train odd.csv --base ./base --steps 2 --out r2",
        ("frage", "--columns"),
        text("odd.csv", "frage,antwort\n2 + 2?,4\n"),
    ),
    Mistake(
        "A base model without a chat template",
        "veneer train rows.jsonl --base ./plain --steps 2 --out r3",
        ("chat template",),
    ),
    Mistake(
        "Rows longer than the context",
        "veneer train long.jsonl --base ./base --steps 2 --out r4",
        ("long.jsonl:1", "truncate"),
        rows("long.jsonl", chat("word " * 3000)),
    ),
    Mistake("A typo in an option", f"{TRAIN} --learing-rate 1e-4 --out r5", ("--learning-rate",)),
    Mistake(
        "A typo in a file of options",
        "veneer train typo.yaml",
        ("typo.yaml", "learning_rat", "learning_rate"),
        text("typo.yaml", "data: rows.jsonl\nlearning_rat: 1e-4\n"),
    ),
    Mistake("A number written as a word", f"{TRAIN} --r sixteen --out r7", ("sixteen", "number")),
    Mistake("A file that is not there", "veneer train row.jsonl --base ./base --out r8", ("row.jsonl", "rows.jsonl")),
    Mistake(
        "A broken line in a file",
        "veneer train broken.jsonl --base ./base --steps 2 --out r9",
        ("broken.jsonl:2",),
        text("broken.jsonl", json.dumps(chat()) + '\n{"messages": [\n'),
    ),
    Mistake(
        "A conversation without an answer",
        "veneer train question.jsonl --base ./base --steps 2 --out r10",
        ("question.jsonl:1",),
        rows("question.jsonl", {"messages": [{"role": "user", "content": "2 + 2?"}]}),
    ),
    Mistake(
        "An unknown role",
        "veneer train bot.jsonl --base ./base --steps 2 --out r11",
        ("bot", "assistant"),
        rows("bot.jsonl", {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "bot", "content": "4"}]}),
    ),
    Mistake(
        "An empty file",
        "veneer train empty.jsonl --base ./base --steps 2 --out r12",
        ("empty.jsonl",),
        text("empty.jsonl", ""),
    ),
    Mistake(
        "Other options in the folder of an earlier run",
        "veneer train rows.jsonl --base ./base --steps 2 --r 4 --out done",
        ("r: 16 in the folder, 4 now", "--out"),
    ),
    Mistake(
        "An adapter where a base belongs",
        "veneer train rows.jsonl --base done/adapter --steps 2 --out r14",
        ("adapter", "base"),
    ),
    Mistake("An adapter on another base", "veneer generate done/adapter hello --base ./other", ("base",)),
    Mistake(
        "A folder that holds nothing",
        "veneer generate nothing hello",
        ("nothing", "adapter_config.json"),
        lambda: Path("nothing").mkdir(exist_ok=True),
    ),
    Mistake(
        "Pickled weights",
        "veneer generate pickled hello --base ./base",
        ("adapter_model.bin", "safetensors"),
        text("pickled/adapter_config.json", '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x"}'),
    ),
    Mistake(
        "An adapter folder without its weights",
        "veneer generate hollow hello --base ./base",
        ("adapter_model.safetensors",),
        text("hollow/adapter_config.json", '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x"}'),
    ),
    Mistake("A command that does not exist", "veneer trian rows.jsonl", ("train",)),
    Mistake(
        "A learning rate that explodes",
        "veneer train rows.jsonl --base ./base --steps 60 --optimizer sgd --clip none "
        "--warmup-steps 0 --learning-rate 1e30 --out r20",
        ("learning_rate",),
    ),
)


def main() -> int:
    """Write the page, or check it."""
    answers = answer_all()
    page = _HEAD + "".join(f"\n## {m.title}\n\n```\n$ {m.command}\n{answers[m.title]}\n```\n" for m in MISTAKES)
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
        print(f"{PAGE.name}: {len(MISTAKES)} mistakes")
        return 0
    same = PAGE.read_text(encoding="utf-8") == page
    print("docs/errors.md is up to date" if same else "docs/errors.md differs; run python -m docs.scripts.errors")
    return 0 if same else 1


def answer_all() -> dict[str, str]:
    """Make every mistake. Returns the messages by title. Raises AssertionError if one is not refused as expected."""
    found, faults = {}, []
    with tempfile.TemporaryDirectory() as folder, _inside(Path(folder)):
        _lay_out()
        for mistake in MISTAKES:
            mistake.prepare()
            code, output = _run(mistake.command)
            wrong = [word for word in mistake.needs if word not in output]
            if code not in (1, 2) or wrong or "Traceback" in output or "bug in veneer" in output:
                faults.append(f"{mistake.title}: exit code {code}, the message lacks {wrong}\n{output}")
            found[mistake.title] = _error_only(output)
    assert not faults, "\n\n".join(faults)
    return found


def _lay_out() -> None:
    """A base, the same without a chat template, another one, rows, and a finished run."""
    from tests.tiny import tiny, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    for name, seed in (("base", 0), ("other", 1), ("plain", 0)):
        tiny("llama", seed=seed).save_pretrained(name)
        if name == "plain":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(name)
    rows("rows.jsonl", *[chat(str(i), f"{i} + 0?") for i in range(40)])()
    code, output = _run("veneer train rows.jsonl --base ./base --steps 2 --out done")
    assert code == 0, output
    Path("pickled").mkdir()
    Path("pickled/adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _run(command: str) -> tuple[int, str]:
    from veneer.cli.main import main as veneer

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = veneer(command.split()[1:])
    return code, output.getvalue()


def _error_only(output: str) -> str:
    """The error message, without the progress lines before it."""
    return re.sub(
        r"^.*?(?=^veneer: error|^\[?\S*\]? ?failed:|failed:)", "", output, count=1, flags=re.DOTALL | re.MULTILINE
    ).strip()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    raise SystemExit(main())
