"""The plan of a run: what it says, what it refuses, what it turns on, and that it leaves no trace in the run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, contents, digest, options

from veneer.errors import MemoryPlanError
from veneer.models.load import Base, load_base
from veneer.training import process_memory as memory
from veneer.training import train
from veneer.training.activation_checkpointing import layers_of
from veneer.training.planning.profile import Measurement, Profile, Profiler
from veneer.training.planning.workload import size
from veneer.training.run.console import Console
from veneer.training.run.decisions import plan

GB = 10**9
MB_A_TOKEN = 8e6
"""What a token costs in a forecast here: a full pass of about 900 tokens takes seven gigabytes, with checkpointing less than two."""


def forecast_of(bytes_a_token: float, monkeypatch: pytest.MonkeyPatch, *, free: int, again: float = 0.25) -> None:
    """Let probes find so many bytes a token (with checkpointing ``again`` times that), on a machine that has ``free`` bytes."""

    def measure(self: Profiler) -> Profile:
        on = layers_of(self.stepper.runner.model)[0].__dict__.get("gradient_checkpointing", False)
        need = bytes_a_token * (again if on else 1)
        tokens = size(self.largest)
        start = memory.resident()
        rungs = tuple(Measurement(n, n * 8, start + int(need * n), 0.01 * n) for n in (tokens // 2, tokens))
        return Profile(start, rungs, (), ((tokens, 0.01 * tokens),), 0.0, tokens, tokens * 8, 0)

    monkeypatch.setattr(Profiler, "measure", measure)
    monkeypatch.setattr(memory, "free", lambda: free)


def wide(place: Path, out: Path, **others: Any) -> dict[str, Any]:
    """A run whose passes hold many rows."""
    return options(place, out, **{"plan": True, "batch_size": 16, **others})


@contextmanager
def marked(base: Base) -> Iterator[list[bool]]:
    """For each call of the base's first layer, whether it was going to be run again."""
    layer, found = layers_of(base.model)[0], []
    handle = layer.register_forward_pre_hook(lambda module, _: found.append("gradient_checkpointing" in vars(module)))
    try:
        yield found
    finally:
        handle.remove()


class Stopper(Console):
    """Presses Ctrl-C at the fourth step that is shown."""

    shown = 0

    def progress(self, text: str, *, important: bool = False) -> None:
        """A step was taken."""
        self.shown += 1
        if self.shown == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_planned_run_has_the_bits_of_one_that_was_not(place: Path, base: Base, tmp_path: Path) -> None:
    """Measuring puts tensors, optimizers, dropout streams and counters back; the plan is told and kept."""
    train(options(place, tmp_path / "a" / "run", plan=False), base=base, console=QUIET)
    train(options(place, tmp_path / "b" / "run", plan=True), base=base, console=QUIET)
    assert digest(tmp_path / "a" / "run") == digest(tmp_path / "b" / "run")
    facts = json.loads((tmp_path / "b" / "run" / "run.json").read_text())
    assert facts["plan"]["peak"] >= memory.highest() // 4 and facts["plan"]["fits"]
    assert facts["plan"]["seconds_per_step"] > 0


def test_what_cannot_fit_is_refused_and_nothing_is_left(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence: need, what there is, what would fit; no folder; the same run with each remedy is taken."""
    forecast_of(MB_A_TOKEN, monkeypatch, free=2 * GB)
    with pytest.raises(MemoryPlanError) as caught:
        train(wide(place, tmp_path / "run"), base=base, console=QUIET)
    said = str(caught.value)
    assert "--activation-checkpointing true" in said and "--no-plan" in said
    assert not (tmp_path / "run").exists()
    remedy = next(word for word in said.replace(",", " ").split("--") if word.startswith("tokens-per-pass"))
    tokens = int(remedy.split()[1])
    forecast_of(MB_A_TOKEN, monkeypatch, free=2 * GB)
    train(wide(place, tmp_path / "run", tokens_per_pass=tokens, steps=1), base=base, console=QUIET)
    forecast_of(MB_A_TOKEN, monkeypatch, free=2 * GB)
    train(wide(place, tmp_path / "two", activation_checkpointing=True, steps=1), base=base, console=QUIET)


def test_a_fresh_run_that_cannot_fit_leaves_the_earlier_one(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--fresh forgets the run in the folder only once the new one has been planned: refused, every file is as it was, and goes on."""
    out = tmp_path / "run"
    train(wide(place, out, plan=False, steps=2), base=base, console=QUIET)
    before = contents(out)
    forecast_of(MB_A_TOKEN, monkeypatch, free=2 * GB)
    with pytest.raises(MemoryPlanError):
        train(wide(place, out, r=3), base=base, console=QUIET, fresh=True)
    assert contents(out) == before
    train(wide(place, out, plan=False, steps=2), base=base, console=QUIET)
    forecast_of(MB_A_TOKEN, monkeypatch, free=200 * GB)
    train(wide(place, out, r=3, steps=1), base=base, console=QUIET, fresh=True)
    assert {path.name for path in (out / "checkpoints").iterdir()} >= {"step-00000001"}
    assert not (out / "checkpoints" / "step-00000002").exists()


def test_no_remedy_is_named_where_none_suffices(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where even one short pass is too much, no single option is offered as a way out, and the command that shows settings is."""
    forecast_of(GB, monkeypatch, free=GB // 100, again=0.9)
    monkeypatch.setattr(memory, "resident", lambda: GB // 100)  # of a process that holds nothing else
    with pytest.raises(MemoryPlanError, match=r"no single option makes it fit; veneer plan --base .* --memory"):
        train(wide(place, tmp_path / "run"), base=base, console=QUIET)


def test_options_that_fit_together_are_offered(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no single option suffices, the best row of the table for this much memory is named with its flags."""
    forecast_of(10 * GB, monkeypatch, free=GB, again=0.9)
    with pytest.raises(
        MemoryPlanError, match=r"these should together: --dtype bfloat16 --r \d+ .*--tokens-per-pass \d+ \(the best"
    ):
        train(wide(place, tmp_path / "run"), base=base, console=QUIET)


@pytest.mark.parametrize(("free", "on"), [(2 * GB, True), (200 * GB, False)])
def test_auto_checkpoints_only_where_memory_would_not_suffice(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, on: bool
) -> None:
    """``auto`` follows the plan; the layers really run again; what was chosen is kept; no bit of the result depends on it."""
    train(wide(place, tmp_path / "a" / "run", plan=False, steps=3), base=base, console=QUIET)
    forecast_of(MB_A_TOKEN, monkeypatch, free=free)
    with marked(base) as marks:
        run = wide(place, tmp_path / "b" / "run", steps=3, activation_checkpointing="auto")
        train(run, base=base, console=QUIET)
    assert any(marks) is on
    assert json.loads((tmp_path / "b" / "run" / "run.json").read_text())["recompute"] is on
    assert digest(tmp_path / "a" / "run") == digest(tmp_path / "b" / "run")


def test_a_run_that_goes_on_keeps_what_auto_chose(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run is not planned again: it computes activations twice if it began so, whatever memory there is now."""
    forecast_of(MB_A_TOKEN, monkeypatch, free=2 * GB)
    run = wide(place, tmp_path / "run", activation_checkpointing="auto")
    with pytest.raises(KeyboardInterrupt):
        train(run, base=base, console=Stopper(quiet=True))
    monkeypatch.setattr(Profiler, "measure", lambda self: pytest.fail("planned again"))
    with marked(base) as marks:
        train(run, base=base, console=QUIET)
    assert any(marks)


@pytest.mark.slow
def test_memory_is_foreseen_on_a_model_that_needs_some(place: Path, tmp_path: Path) -> None:
    """Where activations are hundreds of megabytes, the planned peak of training is within a tenth of the one that is seen."""
    folder = tmp_path / "base"
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "initializer_range": 0.03,
    }
    tiny("llama", num_key_value_heads=4, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    other = load_base(str(folder), dtype="float32")
    run = wide(place, tmp_path / "run", batch_size=128, tokens_per_pass=8192, r=8, lora_dropout=0.0, steps=3)
    found, remedies = plan({**run, "base": str(folder)}, base=other)
    with memory.peak_of() as seen:
        train({**run, "plan": False}, base=other, console=QUIET)
    assert remedies == [] and found.training == pytest.approx(seen.bytes, rel=0.10)


def test_memory_goes_back_only_when_it_piles_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what a pass needs at its height may stay; more is given back, and the need is then seen anew."""
    held, calls = [100], []
    monkeypatch.setattr(memory, "resident", lambda: held[0])
    monkeypatch.setattr(memory, "trim", lambda: (calls.append(held[0]), held.__setitem__(0, 110)))
    heap = memory.Heap()
    for height, after in ((150, 140), (400, 200), (400, 201)):
        held[0] = height
        heap.at_peak()
        held[0] = after
        heap.after_pass()
    assert calls == [201]
    held[0] = 210
    heap.at_peak()
    held[0] = 309
    heap.after_pass()
    assert calls == [201]
    held[0] = 311
    heap.after_pass()
    assert calls == [201, 311]
