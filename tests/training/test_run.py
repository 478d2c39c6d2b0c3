"""A run from its options to its end: going on, being refused, starting over; what a person finds in its folder."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.made import QUIET, contents, digest, figures, four_jobs, options, write_place, write_rows
from torch import nn

from veneer.adapters import LoRA
from veneer.checkpoints import attach, read_adapter
from veneer.checkpoints.run_state import Lock
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.data.order import Order
from veneer.errors import CheckpointError, ConfigError, DataError, TargetError, TrainingError, VeneerError
from veneer.models.load import Base, load_base
from veneer.training import train
from veneer.training.run.console import Console
from veneer.training.run.control import ask


def test_a_run_equals_a_plain_loop(place: Path, base: Base, tmp_path: Path) -> None:
    """The adapter that a run leaves is the one of a loop with transformers, AdamW and the same order of examples."""
    chosen = options(place, tmp_path / "a", lora_dropout=0.0, clip=None, steps=10, r=4, seed=3, schedule="constant")
    result = train(chosen, base=base, console=QUIET)
    examples, _ = load_examples([place / "train.jsonl"], Renderer(base.tokenizer))
    order, bank = Order(len(examples), 3), attach(base.model)
    bank.add("plain", LoRA(r=4), seed=3)
    optimizer = torch.optim.AdamW(bank.parameters("plain"), weight_decay=0.0)
    for step in range(10):
        rows = [examples[order.at(2 * step + i)] for i in range(2)]
        total, weight = torch.zeros(()), 0.0
        for row in rows:
            ids = torch.tensor([row.ids])
            with bank.use("plain", training=True):
                logits = base.model(ids).logits[0, :-1]
            losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            total = total + (losses * torch.tensor(row.weights[1:])).sum()
            weight += sum(row.weights)
        (total / weight).backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()
    plain = {f"{site}.{key}": value.detach() for site, key, value in bank["plain"].named_tensors()}
    bank.detach()
    for site, key, value in read_adapter(result.adapter).named_tensors():
        torch.testing.assert_close(value.detach(), plain[f"{site}.{key}"], rtol=1e-4, atol=2e-6)


def test_a_person_finds_everything_in_the_folder(place: Path, base: Base, tmp_path: Path) -> None:
    """Options, facts, figures, events, checkpoints and adapters are there, and say what happened."""
    out = tmp_path / "run"
    train(options(place, out, valid=(place / "valid.jsonl",), eval_every=4), base=base, console=QUIET)
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "run.json", "metrics", "loss.svg", "events.jsonl", "checkpoints", "adapter", "best", ".lock")
    }
    facts = json.loads((out / "run.json").read_text())
    assert {"torch", "transformers", "python", "threads", "dtype", "base", "data", "held_out", "template"} <= set(facts)
    lines = figures(out / "metrics" / "run.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 4, 8, 12]
    events = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "checkpoint", "checkpoint", "job_ended", "checkpoint"]
    receipt = read_adapter(out / "adapter").meta["receipt"]
    assert (receipt["seed"], receipt["steps"]) == (0, 12) and receipt["data_sha256"] == facts["data"]["run"]


def test_a_finished_run_does_nothing_again(place: Path, base: Base, tmp_path: Path) -> None:
    """The same call says that it is over and leaves every byte; an adapter that was deleted is written again."""
    out = tmp_path / "a"
    first = train(options(place, out), base=base, console=QUIET)
    before, said = digest(out), io.StringIO()
    again = train(options(place, out), base=base, console=Console(said))
    assert again == first and digest(out) == before
    assert "a: already finished at step 12 of 12" in said.getvalue()
    shutil.rmtree(out / "adapter")
    train(options(place, out), base=base, console=QUIET)
    assert digest(out) == before


def stop_after(rounds: int) -> Any:
    """A screen that presses Ctrl-C (once) when so many steps were shown."""

    class Stopper(Console):
        def __init__(self) -> None:
            super().__init__(quiet=True)
            self.shown = 0

        def progress(self, text: str, *, important: bool = False) -> None:
            self.shown += 1
            if self.shown == rounds:
                os.kill(os.getpid(), 2)

    return Stopper()


@pytest.mark.parametrize("at", [1, 4, 5, 9])
def test_a_stopped_run_goes_on_to_the_same_bits(place: Path, base: Base, tmp_path: Path, at: int) -> None:
    """Ctrl-C once ends the round, saves, and raises; the same call goes on. Epochs end in between: nothing is seen twice."""
    never = options(place, tmp_path / "never", name="one", steps=11, batch_size=7)
    train(never, base=base, console=QUIET)
    stopped = options(place, tmp_path / "stopped", name="one", steps=11, batch_size=7)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, base=base, console=stop_after(at))
    assert len(figures(tmp_path / "stopped" / "metrics" / "one.jsonl")) == at
    train(stopped, base=base, console=QUIET)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "never")


def test_it_goes_on_from_a_named_checkpoint(place: Path, base: Base, tmp_path: Path) -> None:
    """The newer ones are of another course and go; the end is the same. A name that is not there lists what is."""
    out = tmp_path / "a"
    train(options(place, out), base=base, console=QUIET)
    before = digest(out)
    with pytest.raises(CheckpointError, match="no checkpoint step-1; it has: step-00000012, step-00000010"):
        train(options(place, out), base=base, console=QUIET, resume_from="step-1")
    with pytest.raises(KeyboardInterrupt):
        train(options(place, out), base=base, console=stop_after(1), resume_from="step-00000010")
    assert len(figures(out / "metrics" / "a.jsonl")) == 11
    train(options(place, out), base=base, console=QUIET)
    assert digest(out) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": 2e-2}, "learning_rate: 0.01 in the folder, 0.02 now"),
        ({"r": 4, "seed": 1}, "r: 2 in the folder, 4 now, seed: 0 in the folder, 1 now"),
        ({"tokens_per_pass": 64}, "tokens_per_pass: 1024 in the folder, 64 now"),
        ({"jobs": [{"name": "a"}, {"name": "b"}]}, 'job "b" is not in the folder'),
    ],
)
def test_other_options_are_refused(place: Path, base: Base, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """A folder that holds another run is told by what differs, and left as it is; --fresh starts over."""
    out = tmp_path / "a"
    train(options(place, out, steps=2), base=base, console=QUIET)
    before = digest(out)
    with pytest.raises(ConfigError, match=says):
        train(options(place, out, steps=2, **change), base=base, console=QUIET)
    assert digest(out) == before
    result = train(options(place, out, steps=2, **change), base=base, console=QUIET, fresh=True)
    assert {job.state for job in result.jobs.values()} == {"finished"} and digest(out) != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_modules": ("nowhere",)}, "nowhere"),
        ({"data": (Path("nowhere.jsonl"),)}, "nowhere.jsonl"),
        ({"base": "/no/such/base"}, "/no/such/base"),
        ({"on_top_of": (Path("/no/such/run"),)}, "/no/such/run"),
        ({"track": "wandb"}, "pip install wandb"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_a_fresh_run_that_is_refused_forgets_nothing(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    """--fresh with a mistake leaves the run that is there, byte by byte."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "a"
    train(options(place, out, steps=2), base=base, console=QUIET)
    before = contents(out)
    with pytest.raises(VeneerError, match=re.escape(says)):
        train(options(place, out, **change), base=None if "base" in change else base, console=QUIET, fresh=True)
    assert contents(out) == before


def test_fresh_from_a_checkpoint_is_refused(place: Path, base: Base, tmp_path: Path) -> None:
    """--fresh forgets the very checkpoint that --resume-from names: one sentence, and it is still there."""
    out = tmp_path / "a"
    train(options(place, out, steps=2), base=base, console=QUIET)
    before = contents(out)
    with pytest.raises(ConfigError, match="give only one of them"):
        train(options(place, out), base=base, console=QUIET, fresh=True, resume_from="step-00000002")
    assert contents(out) == before


def test_what_changes_no_number_may_change(place: Path, base: Base, tmp_path: Path) -> None:
    """Checkpoints may come at other times, and a moved folder, with files of the same content, goes on as the same run."""
    train(options(place, tmp_path / "never", name="a"), base=base, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(options(place, tmp_path / "a"), base=base, console=stop_after(3))
    shutil.move(tmp_path / "a", tmp_path / "moved")
    shutil.copy(place / "train.jsonl", tmp_path / "same.jsonl")
    changed = options(place, tmp_path / "moved", data=(tmp_path / "same.jsonl",), save_every=2)
    train(changed, base=base, console=QUIET)
    assert digest(tmp_path / "moved") == digest(tmp_path / "never")


@pytest.mark.parametrize("what", ["data", "held out", "template", "base", "facts"])
def test_a_run_whose_ground_moved_is_refused(tmp_path: Path, what: str) -> None:
    """Other examples, another template or other weights than the run began with are an error that names them."""
    place = write_place(tmp_path)
    chosen = options(place, tmp_path / "a", valid=(place / "valid.jsonl",), steps=2)
    train(chosen, console=QUIET)
    if what == "data":
        write_rows(place / "train.jsonl", 37, seed=5)
        says = "the examples of a changed"
    elif what == "held out":
        write_rows(place / "valid.jsonl", 5, seed=5)
        says = "the held-out examples of a changed"
    elif what == "template":
        file = place / "base" / "chat_template.jinja"
        file.write_text(file.read_text().replace("You answer in one line.", "You answer in two lines."))
        says = "changed since"
    elif what == "base":
        moved = load_base(str(place / "base")).model
        with torch.no_grad():
            moved.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        moved.save_pretrained(place / "base")
        says = "the base weights are not those"
    else:
        (tmp_path / "a" / "run.json").write_text("{")
        says = r"run\.json cannot be read"
    with pytest.raises(CheckpointError, match=says):
        train(chosen, console=QUIET)


def test_another_machine_is_told(place: Path, base: Base, tmp_path: Path) -> None:
    """Versions, threads and hardware may change; that the last bits may differ from here on is said, unless the run is over."""
    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        train(options(place, out), base=base, console=stop_after(4))
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**facts, "torch": "1.0", "threads": 64}))
    said = io.StringIO()
    train(options(place, out), base=base, console=Console(said))
    assert (
        f"changed since the run began: torch 1.0 -> {torch.__version__}, threads 64 -> 1; the last bits of its numbers may differ"
        in said.getvalue()
    )
    (out / "run.json").write_text(json.dumps({**facts, "torch": "1.0"}))
    again = io.StringIO()
    train(options(place, out), base=base, console=Console(again))
    assert "already finished" in again.getvalue() and "changed since" not in again.getvalue()


def test_jobs_may_be_added(place: Path, base: Base, tmp_path: Path) -> None:
    """A run of several jobs takes up another between two starts; those that were there end with their bits."""
    jobs = four_jobs()
    with pytest.raises(KeyboardInterrupt):
        train(options(place, tmp_path / "a", jobs=jobs[:2]), base=base, console=stop_after(4))
    result = train(options(place, tmp_path / "a", jobs=[*jobs[:2], jobs[3]]), base=base, console=QUIET)
    assert [(job.name, job.state, job.steps) for job in result.jobs.values()] == [
        *(("a", "finished", 12), ("b", "finished", 7), ("d", "finished", 12))
    ]
    with pytest.raises(ConfigError, match='job "d" is only in the folder'):
        train(options(place, tmp_path / "a", jobs=jobs[:2]), base=base, console=QUIET)


def test_a_second_process_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    """While one process works on a run another is told its number; after it died, however it did, nothing is in the way."""
    out = tmp_path / "a"
    code = (
        "import sys, time; from pathlib import Path; from veneer.checkpoints.run_state import Lock\n"
        "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"in use by another process \({holder.pid}\)"):
            train(options(place, out, base="there/is/no/such/base"), console=QUIET)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with Lock(out):
        pass


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data": ("none.jsonl",)}, ConfigError, "there is no file none.jsonl"),
        ({"target_modules": ["q_prj"]}, TargetError, "q_prj"),
        ({"max_length": 5}, DataError, "maximum length is 5"),
        ({"name": "a b"}, ConfigError, "cannot name an adapter"),
        ({"valid_fraction": 0.5, "data": ("one.jsonl",)}, DataError, "cannot divide 1 example"),
        ({"halving": True, "valid_fraction": 0.2}, ConfigError, "this run has one"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    place: Path,
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: Any,
    says: str,
) -> None:
    """A run that cannot begin is one error, and no folder was made for it."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "one.jsonl", 1)
    with pytest.raises(error, match=says):
        train(options(place, tmp_path / "runs" / "a", **change), base=base, console=QUIET)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place_of", ["below a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_told_first(place: Path, tmp_path: Path, place_of: str) -> None:
    """Before the base is loaded, with the folder's name."""
    if place_of == "below a file":
        (tmp_path / "file").write_text("")
        out = tmp_path / "file" / "run"
    else:
        out = Path("/sys/veneer-run")
    with pytest.raises(CheckpointError, match=rf"{out.name} cannot be written: .*--out"):
        train(options(place, out, base="there/is/no/such/base"), console=QUIET)


def test_a_run_of_one_job_that_fails_is_an_error(place: Path, base: Base, tmp_path: Path) -> None:
    """Its code and reason are those of the job, its last good state is kept, and asking again says the same."""
    chosen = options(place, tmp_path / "a", steps=40, save_every=1, learning_rate=1e30, warmup_steps=0)
    for _ in range(2):
        with pytest.raises(TrainingError, match=r'job "a", step 2: .* lower learning_rate') as caught:
            train(chosen, base=base, console=QUIET)
        assert caught.value.code == "non_finite"


def test_a_failed_job_keeps_its_last_good_state(place: Path, base: Base, tmp_path: Path) -> None:
    """Later checkpoints of its neighbours go on carrying it, from before it failed."""
    jobs = [
        {"name": "good"},
        {"name": "bad", "learning_rate": 3e8, "warmup_steps": 8, "clip": None, "optimizer": "sgd"},
    ]
    said = io.StringIO()
    result = train(options(place, tmp_path / "a", jobs=jobs, save_every=1), base=base, console=Console(said))
    bad = result.jobs["bad"]
    assert (bad.state, result.jobs["good"].state) == ("failed", "finished") and bad.steps > 0
    assert f"its state of step {bad.steps} is kept in checkpoints/" in said.getvalue()
    state = json.loads((tmp_path / "a" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["jobs"]["bad"]["kept"] and state["jobs"]["bad"]["progress"]["step"] == bad.steps


def test_the_base_is_as_it_was(place: Path, base: Base, tmp_path: Path) -> None:
    """After a run, and after one that is refused or fails, the base has its bits, its flags and no bank."""
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    train(options(place, tmp_path / "a", jobs=four_jobs(), steps=3), base=base, console=QUIET)
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    attach(base.model).detach()


def test_requests_in_the_folder_are_done_and_survive_a_dead_process(place: Path, base: Base, tmp_path: Path) -> None:
    """One job is paused and one cancelled while the run goes on; asked again to resume, the paused one ends with the bits that it had."""
    jobs = [{"name": "a"}, {"name": "b", "seed": 1}, {"name": "c", "seed": 2}]
    train(options(place, tmp_path / "never", jobs=jobs, tokens_per_shared_pass=0), base=base, console=QUIET)

    class Asking(Console):
        def progress(self, text: str, *, important: bool = False) -> None:
            if "[a] step 3/" in text:
                ask(tmp_path / "asked", "b", "pause")
                ask(tmp_path / "asked", "c", "cancel")

    said = io.StringIO()
    first = train(
        options(place, tmp_path / "asked", jobs=jobs, tokens_per_shared_pass=0),
        base=base,
        console=Asking(said, quiet=False),
    )
    assert {name: (job.state, job.steps) for name, job in first.jobs.items()} == {
        "a": ("finished", 12),
        "b": ("paused", 3),
        "c": ("cancelled", 3),
    }
    assert not list((tmp_path / "asked").glob("control*"))
    ask(tmp_path / "asked", "b", "resume")
    again = train(options(place, tmp_path / "asked", jobs=jobs, tokens_per_shared_pass=0), base=base, console=QUIET)
    assert again.jobs["b"].state == "finished" and again.jobs["c"].state == "cancelled"
    for name in ("a", "b"):
        one, other = (tmp_path / run / "adapters" / name / "adapter_model.safetensors" for run in ("asked", "never"))
        assert one.read_bytes() == other.read_bytes()
