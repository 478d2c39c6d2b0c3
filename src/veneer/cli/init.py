"""``veneer init``: ask four questions and write a YAML file of options with comments.

Every answer has a flag. Questions are asked only on a terminal; elsewhere the flags and defaults are used.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from veneer._files import replacing
from veneer._terminal import is_terminal
from veneer.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """One question: the option that it answers, its text, and the answer to an empty line ("" if an answer is needed)."""

    option: str
    text: str
    default: str = ""
    choices: tuple[str, ...] = ()


QUESTIONS = (
    Question("data", "Which file has your examples (.jsonl, .csv, .parquet)?"),
    Question("base", "Which base model (a Hub id, a folder, a GGUF file)?", "smollm2-135m"),
    Question("method", "Which method?", "lora", ("lora", "dora", "both")),
    Question("name", "Which name for the adapter?", "first"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", nargs="?", default="run.yaml", metavar="FILE", help="file to write (default: run.yaml)")
    for question in QUESTIONS:
        default = f" (default: {question.default})" if question.default else ""
        choices = question.choices or None
        parser.add_argument(f"--{question.option}", choices=choices, help=f"answer to: {question.text}{default}")


def run(args: argparse.Namespace) -> int:
    """Ask, check the answers as ``veneer train`` would, and write the file."""
    from veneer.config import TrainOptions, resolve
    from veneer.training.run.jobs import expand

    file = Path(args.file)
    if file.exists():
        raise ConfigError(f"{file} exists already; give another name, or train it with: veneer train {file}")
    answers = {question.option: getattr(args, question.option) or _ask(question) for question in QUESTIONS}
    with replacing(file) as written:
        written.write_text(_document(answers), encoding="utf-8")
        expand(resolve(TrainOptions, written)[0])
    print(f"wrote {file}; next:")
    print(f"  veneer data check {answers['data']} --base {answers['base']}")
    print(f"  veneer plan {file}")
    print(f"  veneer train {file}")
    return 0


def _ask(question: Question) -> str:
    """Return the answer typed by the user; without a terminal, the default."""
    hint = f" [{'/'.join(question.choices) or question.default}]" if question.default else ""
    while is_terminal(sys.stdin) and is_terminal(sys.stdout):
        answer = input(f"{question.text}{hint} ").strip() or question.default
        if answer and (not question.choices or answer in question.choices):
            return answer
        print(f"  please answer {' or '.join(question.choices) or 'with a name'}")
    if not question.default:
        raise ConfigError(f"give --{question.option}, since no questions can be asked here ({question.text})")
    return question.default


def _document(answers: dict[str, str]) -> str:
    both = answers["method"] == "both"
    method = "[lora, dora]     # both, as two jobs on one base" if both else f"{answers['method']}"
    return f"""\
# Options of a training run. Start or resume it with: veneer train FILE
# veneer train --help describes all options; veneer config schema prints a JSON Schema for editors.

data: {_quoted(answers["data"])}
base: {_quoted(answers["base"])}
out: {_quoted("runs/" + answers["name"])}

# A held-out share shows overfitting and selects the best adapter.
valid_fraction: 0.1

method: {method}
r: 16                    # rank: more for more to learn; 4 to 64 is usual
lora_alpha: 32           # scale of the change: lora_alpha / r

epochs: 1                # or steps: 200
batch_size: 16           # examples per step
# learning_rate: 2e-4    # without this line it follows the size of the base
# max_length: 1024       # longer examples are an error unless truncate is drop or end
# seed: 0
"""


def _quoted(text: str) -> str:
    """Return a YAML scalar for any text."""
    plain = all(letter.isalnum() or letter in "/._-" for letter in text) and text[:1].isalpha()
    return text if plain else "'" + text.replace("'", "''") + "'"
