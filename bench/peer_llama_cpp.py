"""llama.cpp's side of beside_llama_cpp.py, run by an interpreter with llama-cpp-python: BASE.gguf ADAPTER.gguf IDS.json OUT.npy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
from llama_cpp import Llama


def main(base: str, adapter: str, ids: str, out: str) -> None:
    """Write the logits [positions, vocabulary] of all rows."""
    rows = json.loads(Path(ids).read_text())
    model = Llama(base, lora_path=adapter, logits_all=True, n_ctx=max(map(len, rows)) + 8, n_batch=512, verbose=False)
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(numpy.array(model.scores[: len(row)], dtype=numpy.float32))
    numpy.save(out, numpy.concatenate(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
