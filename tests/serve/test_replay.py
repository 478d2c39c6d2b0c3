"""Random traces over many adapters: every answer equals the same request alone; a trace that is wrong is refused line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.serve_trace import in_order, make_adapters, random_trace
from tests.serve.engine.traces import engine, folders
from tests.tiny import VOCAB, tiny, tiny_tokenizer
from tests.training.made import SIZES

from veneer.cli import main as cli
from veneer.errors import ConfigError, ServeError
from veneer.serve.engine.adapters import AdapterLimits, AdapterStore
from veneer.serve.engine.engine import EngineLimits
from veneer.serve.engine.request import GenerationRequest, SamplingParams
from veneer.serve.engine.scheduler import SchedulerLimits
from veneer.serve.replay import Replay, ReplayedAnswer, require
from veneer.serve.trace import TraceStep, read_trace

TIGHT = EngineLimits(
    context=128,
    cache_tokens=640,
    block=4,
    scheduler=SchedulerLimits(running=12, step_tokens=48, patience=4, reserve=4),
    adapters=AdapterLimits(in_bank=4, in_memory=6),
)


def trace(names: list[str], requests: int, seed: int, **options: Any) -> list[TraceStep]:
    """A random trace."""
    return [TraceStep(**line) for line in in_order(random_trace(names, requests, seed=seed, **options))]


@pytest.fixture(scope="module")
def place_of_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    folders(folder, 8)
    return folder


def test_answers_of_a_trace_equal_each_request_alone(place_of_adapters: Path) -> None:
    """Forty requests over eight adapters in a small cache, with loads, unloads, replacements, evictions and cancellations."""
    made = engine()
    assert made.bank is not None
    names = [f"a{i}" for i in range(8)]
    replay = Replay(made.model, made.tokenizer, made.bank, place_of_adapters, TIGHT)
    report = replay.run(trace(names, 40, 5, rate=200.0, tokens=6))
    require(report)
    counts = report.counts
    compared = counts["equal"] + counts["equal up to the cut"] + counts["equal up to a tie"]
    assert compared + counts["refused"] == 40 and counts["equal"] > 28
    assert min(counts["loaded"], counts["replaced"], counts["unloaded"], report.metrics.adapter_evictions) > 0
    assert made.bank.names == []


def test_a_difference_is_found(place_of_adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that goes on with the first content of a name is caught, by the request and its adapter."""
    load = AdapterStore.load

    def stale(store: AdapterStore, name: str, path: Path, *, pinned: bool) -> Any:
        known = [one for one in store.status() if one.name == name]
        return known[0] if known else load(store, name, path, pinned=pinned)

    monkeypatch.setattr(AdapterStore, "load", stale)
    made = engine()
    assert made.bank is not None
    steps = [
        TraceStep(at=0, load="x", folder="a0"),
        TraceStep(at=0, request="r1", prompt="The rain", model="x", max_tokens=8),
        TraceStep(at=0, load="x", folder="a1"),
        TraceStep(at=0, request="r2", prompt="The rain", model="x", max_tokens=8),
    ]
    report = Replay(made.model, made.tokenizer, made.bank, place_of_adapters, TIGHT).run(steps)
    assert report.counts["equal"] == 1
    with pytest.raises(ServeError, match=r"1 problems of the replay: r2: differs .* at token \d+ \(x:1\)"):
        require(report)


def test_a_draw_that_rounding_decides_is_no_difference() -> None:
    """A token whose logit equals the chosen one's is a tie; any other token is a difference."""
    made = engine()
    request = GenerationRequest("r", (5, 9, 40), (), SamplingParams(max_tokens=6, ignore_eos=True))
    stream = made.submit(request)
    while made.step():
        pass
    answer = ReplayedAnswer(request, (), stream)
    answer.wait()
    chosen = answer.tokens[3]
    equal, other = sorted(set(range(chosen + 1, VOCAB)) - {*answer.tokens})[:2]  # of equal ones the first is chosen
    with torch.no_grad():
        made.model.lm_head.weight[equal] = made.model.lm_head.weight[chosen]
    for token, outcome in ((chosen, "equal"), (equal, "equal up to a tie"), (other, "problem")):
        replay = Replay(made.model, made.tokenizer, made.bank, Path(), TIGHT)  # type: ignore[arg-type]
        changed = [*answer.tokens[:3], token, *answer.tokens[4:]]
        replay._judge(ReplayedAnswer(request, (), stream, changed, answer.end), made, request)
        found = [*replay._counts, *("problem" for _ in replay._problems)]
        assert found == [outcome], (token, chosen, found)


def test_wrong_lines_are_named(tmp_path: Path) -> None:
    """Every line that is wrong is named with its problem, all at once."""
    lines = [
        '{"at": 0, "request": "r1"}',
        '{"at": 0, "request": "r2", "prompt": "a", "temperature": 1}',
        '{"at": 0, "load": "x", "prompt": "a"}',
        '{"at": 0, "load": "x", "colour": 1}',
        '{"at": 0, "cancel": "r9"}',
        '{"at": 5, "load": "x"}',
        '{"at": 1, "unload": "x"}',
        '{"at": 6}',
        "{",
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_trace(file)
    for part in (
        "line 1: a request needs a prompt",
        "line 2: a temperature above 0 needs a seed",
        "line 3: load takes no prompt",
        "line 4: ",
        "line 5: cancel: no request above is named r9",
        "line 7: at: 1 is before",
        "line 8: expected one of request, load, unload and cancel, found none",
        "line 9: ",
    ):
        assert part in str(error.value), str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none")


def test_replay_is_a_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``veneer serve --replay`` tells what it compared, and needs a folder of adapters; folders outside it are refused."""
    from tests.serve.api.made import write_adapters

    from veneer import DoRA, LoRA

    write_adapters(place / "base", tmp_path / "adapters", {"sql": LoRA(r=2), "style": DoRA(r=3)})
    lines: list[dict[str, Any]] = [
        {"at": 0, "load": "sql"},
        {"at": 0, "load": "style"},
        {"at": 0, "request": "r1", "prompt": "The rain", "model": "sql", "max_tokens": 6},
        {"at": 0, "request": "r2", "prompt": "The rain", "adapters": {"sql": 0.5, "style": 0.5}, "max_tokens": 6},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = ["serve", "--base", str(place / "base"), "--dtype", "float32", "--replay", str(file)]
    assert cli.main([*words, "--adapters", str(tmp_path / "adapters")]) == 0
    assert "2 answers equal the same request alone" in capsys.readouterr().out
    assert cli.main(words) == 2
    assert "--replay needs --adapters" in capsys.readouterr().err
    file.write_text('{"at": 0, "load": "x", "folder": "../adapters"}\n', encoding="utf-8")
    assert cli.main([*words, "--adapters", str(tmp_path / "adapters")]) == 1
    assert "which is not in" in capsys.readouterr().err


WHOLE_STEPS = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes with heads of 32, which the kernel for whole decoding steps takes."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("arch", "sizes", "requests", "seed"),
    [
        *(pytest.param("llama", SIZES, 2000, seed, id=f"llama-{seed}") for seed in range(3)),
        *(pytest.param("llama", WHOLE_STEPS, 1000, seed, id=f"whole steps-{seed}") for seed in range(3)),
        pytest.param("mistral", {**WHOLE_STEPS, "sliding_window": 24}, 500, 3, id="whole steps with windows"),
        *(
            pytest.param(arch, {}, 500, seed, id=f"{arch}-{seed}")
            for arch in ("qwen3", "mistral", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe", "gpt2")
            for seed in range(2)
        ),
        pytest.param("falcon", {}, 200, 0, id="padded rows"),
        pytest.param("mamba", {}, 200, 0, id="the model's own cache"),
    ],
)
def test_long_traces(arch: str, sizes: dict[str, Any], requests: int, seed: int, tmp_path: Path) -> None:
    """Long traces over fifty adapters of up to seven methods, with eight slots and twelve adapters in memory.

    In fp32, as it is served. Among thousands of drawn tokens, a few lie so close to a bound that sums in another order change them.
    """
    from veneer.checkpoints import attach
    from veneer.models.load import load_base

    tiny(arch, **sizes).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapters"
    make_adapters(str(tmp_path / "base"), folder)
    base = load_base(str(tmp_path / "base"), dtype="float32")
    bank = attach(base.model)
    limits = EngineLimits(cache_tokens=2048, block=8, adapters=AdapterLimits(in_bank=8, in_memory=12))
    names = sorted(child.name for child in folder.iterdir())
    replay = Replay(base.model, base.tokenizer, bank, folder, limits)
    report = replay.run(trace(names, requests, seed))
    print(report.counts, f"{report.metrics.adapter_evictions} evictions, {report.metrics.preemptions} preemptions")
    require(report)
    assert len(names) == 50 and report.counts["equal"] > 0.75 * requests
    assert report.counts["equal up to a tie"] <= 0.005 * requests
    assert report.metrics.adapter_evictions > requests / 20
    bank.detach()
