"""lm-eval's ``local-completions`` runs against the server, and its score is that of ``veneer evaluate``."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serve.api.made import KEY, Running, write_adapters
from tests.tiny import tiny, tiny_tokenizer

from veneer import DoRA
from veneer.cli import main as cli

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}{end}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_score_of_lm_eval_equals_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The perplexity of answers to sums, of the base and of a DoRA adapter, by token ids of a local and of the server's tokenizer."""
    tiny("llama").save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    write_adapters(tmp_path / "base", tmp_path / "adapters", {"style": DoRA(r=3)})
    draw = random.Random(0)
    sums = [(draw.randrange(90), draw.randrange(90)) for _ in range(20)]
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in sums]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(TASK.format(rows=data, end=tokenizer.eos_token), encoding="utf-8")
    capsys.readouterr()
    words = ["evaluate", str(tmp_path / "adapters" / "style"), "--data", str(data), "--dtype", "float32", "--json"]
    assert cli.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"].values()
    assert found["examples"] == 20
    running = Running(tmp_path / "base", tmp_path / "state", tmp_path / "adapters")
    for model, backend, batch in (("base", "huggingface", 1), ("style", "huggingface", 4), ("style", "remote", 4)):
        out = tmp_path / f"{model}-{backend}"
        tokens = f",tokenizer={tmp_path / 'base'}" if backend == "huggingface" else f",auth_token={KEY}"
        model_args = f"model={model},base_url={running.server.url}/completions,tokenizer_backend={backend}{tokens}"
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model_args, "--tasks", "sums",
             "--include_path", str(tasks), "--output_path", str(out), "--batch_size", str(batch)],
            env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]["sums"]
        loss = found["routes"][model]["loss"] * found["tokens"] / found["examples"]
        if backend == "huggingface":
            assert results["perplexity,none"] == pytest.approx(math.exp(loss), rel=1e-4), model
        else:  # the server encodes the end token's text as text
            assert math.isfinite(results["perplexity,none"])
    running.close()
