"""llama.cpp's side of serve_llama_cpp.py, run by an interpreter with xllamacpp: MODEL.gguf THREADS; each line asks for a text."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import xllamacpp


def main(model: str, threads: str) -> None:
    """Answer each line with seconds and processor seconds a token, and the text."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = model, 1024, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        prompt, count = json.loads(line)
        body = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        used = time.process_time()
        found: Any = server.handle_completions(body)
        found = json.loads(found) if isinstance(found, str) else found
        used = time.process_time() - used
        seconds = found["timings"]["predicted_per_token_ms"] / 1e3
        share = seconds * count / (seconds * count + found["timings"]["prompt_ms"] / 1e3)
        text = found.get("content") or found["choices"][0]["text"]
        print(json.dumps([seconds, used * share / count, text]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
