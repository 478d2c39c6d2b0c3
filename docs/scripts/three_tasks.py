"""Three small tasks for the embedded model, built from Python's standard library and a seed, and their evaluation.

    docstrings   a function's source            -> the first sentence of its docstring
    dates        2031-07-04                     -> the fourth of July, 2031
    records      a sentence about somebody      -> the same as JSON with four keys

They have nothing in common but the base: other inputs, other answers, other losses. Evaluation rows are never trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from veneer.adapters import Bank
from veneer.adapters.runtime.route import RouteLike
from veneer.checkpoints import attach
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.data.example import Example
from veneer.data.stdlib_docs import stdlib_pairs
from veneer.evaluate.general import general_text, pieces
from veneer.evaluate.losses import Losses, example_losses
from veneer.models.flat import FlatRunner
from veneer.models.load import Base, load_base

TASKS = ("docstrings", "dates", "records")
BASE = "smollm2-135m"
TRAIN, VALID = 480, 48
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
_MONTHS += ("December",)
_ONES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh")
_TEENS = ("twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth")
_TWENTIES = ("twentieth", *(f"twenty-{word}" for word in _ONES[:9]), "thirtieth", "thirty-first")
_DAYS = (*_ONES, *_TEENS, *_TWENTIES)
_FIRST = (
    "Ada",
    "Boris",
    "Chen",
    "Dina",
    "Emil",
    "Fatou",
    "Gita",
    "Hugo",
    "Ines",
    "Jonas",
    "Kei",
    "Lena",
    "Mara",
    "Nils",
)
_LAST = (
    "Abel",
    "Brandt",
    "Costa",
    "Diallo",
    "Egede",
    "Fischer",
    "Garcia",
    "Holm",
    "Ito",
    "Jansen",
    "Kowal",
    "Lindqvist",
)
_CITIES = ("Oslo", "Lima", "Kyoto", "Accra", "Turin", "Porto", "Quito", "Lviv", "Cork", "Graz", "Bergen", "Nantes")
_JOBS = (
    "baker",
    "pilot",
    "nurse",
    "welder",
    "evaluator",
    "tailor",
    "farmer",
    "printer",
    "diver",
    "glazier",
    "surveyor",
)


def write_tasks(folder: Path, seed: int = 0) -> dict[str, dict[str, Path]]:
    """Write ``TASK.train.jsonl`` and ``TASK.valid.jsonl`` for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Path]] = {}
    for task, (train, valid) in _rows(random.Random(seed)).items():
        files[task] = {"train": folder / f"{task}.train.jsonl", "valid": folder / f"{task}.valid.jsonl"}
        for part, rows in (("train", train), ("valid", valid)):
            lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
            files[task][part].write_text("".join(lines), encoding="utf-8")
    return files


def _rows(rng: random.Random) -> dict[str, tuple[list[Any], list[Any]]]:
    train, valid = stdlib_pairs(300)
    docstrings = (
        [row["messages"] for row in rng.sample(train, TRAIN)],
        [row["messages"] for row in valid[:: len(valid) // VALID][:VALID]],
    )
    made = {"docstrings": docstrings}
    for task, make in (("dates", _date), ("records", _record)):
        rows = {json.dumps(row := make(rng)): row for _ in range(3 * TRAIN)}
        chosen = list(rows.values())[: TRAIN + VALID]
        made[task] = chosen[VALID:], chosen[:VALID]
    return made


def _date(rng: random.Random) -> list[dict[str, str]]:
    year, month, day = rng.randrange(1900, 2100), rng.randrange(1, 13), rng.randrange(1, 29)
    answer = f"the {_DAYS[day - 1]} of {_MONTHS[month - 1]}, {year}"
    return _turns(f"Write this date in words: {year}-{month:02}-{day:02}", answer)


def _record(rng: random.Random) -> list[dict[str, str]]:
    name, age = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}", rng.randrange(19, 80)
    city, job = rng.choice(_CITIES), rng.choice(_JOBS)
    forms = (
        f"{name} is {age}, lives in {city} and works as a {job}.",
        f"In {city} there is a {job} of {age} years called {name}.",
        f"The {job} {name}, aged {age}, has moved to {city}.",
    )
    answer = json.dumps({"who": name, "years": age, "where": city, "trade": job})
    return _turns(f"Turn into a record: {rng.choice(forms)}", answer)


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Evaluator:
    """Held-out losses of routes on every task and on a general text, in fp32."""

    def __init__(self, files: Mapping[str, Mapping[str, Path]], *, rows: int = VALID, general: int = 16) -> None:
        self.base: Base = load_base(BASE, dtype="float32")
        self.bank: Bank = attach(self.base.model)
        self.runner = FlatRunner(self.base.model)
        renderer = Renderer(self.base.tokenizer)
        self.sets: dict[str, list[Example]] = {
            task: load_examples([own["valid"]], renderer)[0][:rows] for task, own in files.items()
        }
        self.sets["general"] = pieces(general_text(), self.base.tokenizer, length=256, count=general)

    def losses(self, route: RouteLike) -> dict[str, float]:
        """Mean loss by set."""
        return {name: found.mean for name, found in self.whole(route).items()}

    def whole(self, route: RouteLike) -> dict[str, Losses]:
        """Losses of each example by set."""
        with torch.no_grad():
            return {
                name: example_losses(self.runner, own, bank=self.bank, route=route) for name, own in self.sets.items()
            }


def cached(file: Path, key: str, make: Any) -> Any:
    """A named result in a JSON file, computed once, so that a stopped script can resume."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if key not in known:
        made = make()
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known[key] = made
        file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]
