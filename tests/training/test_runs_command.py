"""``veneer runs``: the list is true to the folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.checkpoints.run_state import Lock
from veneer.cli._run_list import JobStatus, list_runs
from veneer.cli.main import main
from veneer.training.run.control import Control


def write_run(folder: Path, jobs: dict[str, dict[str, Any]], *, steps: int = 3) -> Path:
    """A run's folder as training leaves it, without the tensors."""
    (folder / "metrics").mkdir(parents=True)
    (folder / "config.yaml").write_text("base: some/base\ndata: [rows.jsonl]\n")
    saved = folder / "checkpoints" / f"step-{steps:08d}"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"round": steps, "jobs": jobs}))
    (folder / "checkpoints" / "LATEST").write_text(saved.name)
    for name in jobs:
        lines = [{"step": step, "loss": 5.0 - step} for step in range(1, steps + 1)]
        lines.append({"step": steps, "held_out_loss": 2.5, "best": True})
        (folder / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def saved_job(state: str, step: int = 3, reason: str = "") -> dict[str, Any]:
    return {"state": state, "reason": reason, "progress": {"step": step, "evaluations": [[step, 2.5]], "best": 2.5}}


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


def test_every_job_is_listed_with_its_state_losses_and_adapter(tmp_path: Path) -> None:
    """One row for each job of each run below the folder, with what its files say."""
    one = write_run(tmp_path / "one", {"one": saved_job("finished")})
    write_adapter(one / "adapter")
    two = write_run(
        tmp_path / "deep" / "two", {"b": saved_job("failed", 2, "the loss is nan"), "a": saved_job("finished")}
    )
    write_adapter(two / "adapters" / "a")
    (tmp_path / "no-run").mkdir()
    assert list_runs(tmp_path) == [
        JobStatus(str(two), "a", "finished", "", 3, 2.0, 2.5, 2.5, "some/base", str(two / "adapters" / "a")),
        JobStatus(str(two), "b", "failed", "the loss is nan", 3, 2.0, 2.5, 2.5, "some/base", None),
        JobStatus(str(one), "one", "finished", "", 3, 2.0, 2.5, 2.5, "some/base", str(one / "adapter")),
    ]


def test_a_job_is_running_while_its_run_is_held(tmp_path: Path) -> None:
    """A run whose process died is interrupted; one that a process works on is running; looking does not disturb the lock."""
    run = write_run(tmp_path / "a", {"a": saved_job("running")})
    assert [row.state for row in list_runs(tmp_path)] == ["interrupted"]
    with Lock(run):
        assert [row.state for row in list_runs(tmp_path)] == ["running"]
    assert [row.state for row in list_runs(tmp_path)] == ["interrupted"]


def test_figures_written_since_the_last_checkpoint_count(tmp_path: Path) -> None:
    """Step and losses come from the newest whole line; a line that is still being written is left out."""
    run = write_run(tmp_path / "a", {"a": saved_job("running")})
    with (run / "metrics" / "a.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.5}\n{"step": 5, "lo')
    (row,) = list_runs(tmp_path)
    assert (row.step, row.loss, row.held_out) == (4, 0.5, 2.5)


def test_a_run_before_its_first_checkpoint_is_listed(tmp_path: Path) -> None:
    """A run that has nothing but its options and an empty folder of figures has a row."""
    (tmp_path / "new" / "metrics").mkdir(parents=True)
    (tmp_path / "new" / "config.yaml").write_text("base: b\n")
    (row,) = list_runs(tmp_path)
    assert (row.job, row.state, row.step, row.loss, row.adapter) == ("new", "interrupted", 0, None, None)


def test_the_list_follows_the_files_and_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    """A changed checkpoint shows in the next list, and listing writes nothing."""
    run = write_run(tmp_path / "a", {"a": saved_job("finished")})
    before = sorted(tmp_path.rglob("*"))
    assert [row.state for row in list_runs(tmp_path)] == ["finished"]
    state = run / "checkpoints" / "step-00000003" / "state.json"
    state.write_text(state.read_text().replace("finished", "cancelled"))
    assert [row.state for row in list_runs(tmp_path)] == ["cancelled"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_gone_leaves_the_list(tmp_path: Path) -> None:
    """The list holds nothing that the folders do not."""
    write_run(tmp_path / "a", {"a": saved_job("finished")})
    b = write_run(tmp_path / "b", {"b": saved_job("finished")})
    assert [row.job for row in list_runs(tmp_path)] == ["a", "b"]
    b.rename(tmp_path / "c")
    assert [row.run for row in list_runs(tmp_path)] == [str(tmp_path / "a"), str(tmp_path / "c")]


def test_damaged_files_of_a_run_do_not_hide_the_others(tmp_path: Path) -> None:
    """What cannot be read leaves its cells empty."""
    bad = write_run(tmp_path / "bad", {"bad": saved_job("finished")})
    (bad / "config.yaml").write_bytes(b"\xff\xfe: [")
    (bad / "checkpoints" / "step-00000003" / "state.json").write_text('{"jobs": [')
    (bad / "metrics" / "bad.jsonl").write_text("[]\nnull\n{broken\n")
    write_run(tmp_path / "good", {"good": saved_job("finished")})
    assert [(row.job, row.state, row.base) for row in list_runs(tmp_path)] == [
        ("bad", "interrupted", ""),
        ("good", "finished", "some/base"),
    ]


def test_the_list_is_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths are shown as seen from where the command is called."""
    write_adapter(write_run(tmp_path / "runs" / "a", {"a": saved_job("finished")}) / "adapter")
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "runs/a/adapter" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "runs")
    assert main(["runs", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["adapter"] == "a/adapter"


def test_a_folder_without_runs_and_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder is not an error, nor is the default one before the first run; another that is missing is, in one sentence."""
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "start one with veneer train DATA --out runs/NAME" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0
    assert "contains no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_list_needs_no_torch(tmp_path: Path) -> None:
    """The list is there at once: torch is not imported for it."""
    write_run(tmp_path / "a", {"a": saved_job("finished")})
    code = "import sys; from veneer.cli.main import main; main(['runs', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def taken(run: Path, said: list[str] | None = None) -> list[tuple[str, str]]:
    """The requests that wait in a run's folder, and in ``said`` the lines about others."""
    found = Control(run).take(["sql", "style"], [].append if said is None else said.append)
    return [(request.job, request.verb) for request in found]


def test_no_request_is_lost(tmp_path: Path) -> None:
    """One that was taken and is not saved yet stays beside those that come later; one that cannot be read is told once."""
    run, said = tmp_path, list[str]()
    (run / "control.json").write_text('{"sql": "pause"}')
    control = Control(run)
    assert len(control.take(["sql", "style"], said.append)) == 1
    (run / "control.json").write_text('{"style": "cancel"}')
    assert taken(run) == [("sql", "pause"), ("style", "cancel")]  # as after a crash
    control.forget()
    assert taken(run) == [("style", "cancel")] and not said
    (run / "control.json").write_text('{"sql": "pau')
    assert taken(run, said) == taken(run, said) == [("style", "cancel")] and len(said) == 1


def test_a_job_is_paused_and_cancelled_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests wait in the run's folder beside each other; what cannot be asked for is one sentence."""
    run = write_run(tmp_path / "a", {"sql": saved_job("running"), "style": saved_job("finished")})
    assert main(["runs", str(run), "--pause", "sql"]) == 0
    assert f"{run}: pause sql, when the run is resumed" in capsys.readouterr().out
    with Lock(run):
        assert main(["runs", str(run), "--cancel", "*"]) == 0
    assert "cancel all jobs, after the current step" in capsys.readouterr().out
    assert taken(run) == [("sql", "pause"), ("sql", "cancel"), ("style", "cancel")]
    for words, says in ((["--pause"], "pause all jobs"), (["--resume", "--json"], "resume all jobs")):
        assert main(["runs", str(run), *words]) == 0
        assert says in capsys.readouterr().out
    assert main(["runs", "--pause", "sql", str(run)]) == 0
    assert taken(run)[-3:] == [("sql", "resume"), ("style", "resume"), ("sql", "pause")]
    over = write_run(tmp_path / "b", {"sql": saved_job("finished")})
    for wrong, says in (
        ([str(run), "--pause", "style"], 'has no unfinished job "style"; unfinished jobs: sql'),
        ([str(over), "--pause"], "b has no unfinished job"),
        ([str(tmp_path), "--pause", "sql"], "is not a run; name the folder of one run"),
    ):
        assert main(["runs", *wrong]) == 1
        assert says in capsys.readouterr().err
