"""Rows of a workload: tokens with their weights.

uniform    pieces of text of one length, the second half of each supervised
ragged     conversations with the answer supervised; lengths are log-normal, mean about 175, up to 700, each filled with the row of the
           nearest length. Read from the JSONL files of a folder, or built from Python's standard library.

For bases without a tokenizer the tokens are random.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

from bench.cases import Workload
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.data.example import Example
from veneer.data.stdlib_docs import stdlib_pairs
from veneer.models.load import load_tokenizer

Rows = list[dict[str, Any]]
MEAN, SPREAD, SHORTEST, LONGEST = 175, 0.62, 24, 700
_LONG_CODE, _POOL = 4000, 3000


def steps_of(workload: Workload, count: int, *, data: Path | None = None, vocabulary: int = 0) -> list[Rows]:
    """``count`` steps of ``workload.batch`` rows. vocabulary: size for random tokens, if the base has no tokenizer."""
    need = count * workload.batch
    if workload.rows == "ragged":
        rows = _ragged(need, data)
    else:
        tokens = _random(need * workload.length, vocabulary) if vocabulary else _text(need * workload.length)
        half = workload.length // 2
        weights = [0.0] * (workload.length - half) + [1.0] * half
        starts = range(0, need * workload.length, workload.length)
        rows = [{"ids": tokens[a : a + workload.length], "weights": weights} for a in starts]
    return [rows[a : a + workload.batch] for a in range(0, need, workload.batch)]


def _random(count: int, vocabulary: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(vocabulary) for _ in range(count)]


def _text(count: int) -> list[int]:
    rows = _rendered(stdlib_pairs()[0][: 50 + count // 100])
    found = [token for example in rows for token in example.ids]
    while len(found) < count:
        found += found
    return found[:count]


def _ragged(count: int, data: Path | None) -> Rows:
    """Rows that follow the drawn lengths, without repeats if there are enough."""
    source = _read(data) if data else stdlib_pairs(_LONG_CODE)[0]
    draw = random.Random(0)
    draw.shuffle(source)
    pool = sorted((e for e in _rendered(source[:_POOL]) if SHORTEST <= len(e) <= LONGEST), key=len)
    if not pool:
        raise SystemExit(f"{data}: no row of {SHORTEST} to {LONGEST} tokens; give a folder of JSONL with longer ones")
    found = []
    for _ in range(count):
        length = draw.lognormvariate(math.log(MEAN) - SPREAD**2 / 2, SPREAD)
        nearest = min(range(len(pool)), key=lambda i, target=length: abs(len(pool[i]) - target))  # type: ignore[misc]
        example = pool.pop(nearest) if len(pool) > 1 else pool[nearest]
        found.append({"ids": list(example.ids), "weights": [float(w > 0) for w in example.weights]})
    return found


def _rendered(rows: list[dict[str, Any]]) -> list[Example]:
    """Conversations rendered as by ``veneer train``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows), encoding="utf-8")
        found, _ = load_examples([path], Renderer(load_tokenizer("smollm2-135m")), truncate="drop")
        return found[:]


def _read(folder: Path) -> list[dict[str, Any]]:
    """Conversations from the JSONL files of a folder: messages, questions with answers, or instructions with instances."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "messages" in row:
                found.append({"messages": row["messages"]})
            elif "question" in row and "answer" in row:
                found.append(_pair(row["question"], row["answer"]))
            elif "instruction" in row:
                found += [
                    _pair(f"{row['instruction']}\n{one['input']}".strip(), one["output"]) for one in row["instances"]
                ]
    return found


def _pair(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
