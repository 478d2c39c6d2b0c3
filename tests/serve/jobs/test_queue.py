"""The queue of jobs: the adapters of `veneer train`, several at once, paused, cancelled, and resumed after a restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.jobs.made import SHORT, Jobs, wait
from tests.training.made import QUIET

from veneer.models.load import Base, load_base
from veneer.training import train


@pytest.fixture(scope="module")
def base(place: Path) -> Base:
    """The tiny base."""
    return load_base(str(place / "base"), dtype="float32")


@pytest.fixture
def jobs(tmp_path: Path, base: Base) -> Iterator[Jobs]:
    """A queue that runs two jobs at once."""
    made = Jobs(tmp_path / "state", base)
    made.queue.start()
    yield made
    made.close()


def weights(folder: Path) -> str:
    """Hash of an adapter's weights file."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def trained(place: Path, out: Path, data: Path, **options: Any) -> str:
    """Hash of the weights that ``veneer train`` writes for the short job."""
    result = train(
        {
            **SHORT["adapter"],
            **SHORT["training"],
            "batch_size": 2,
            "data": (data,),
            "base": str(place / "base"),
            "dtype": "float32",
            "out": out,
            "plan": False,
            "compile": False,  # the queue of these tests has no C++ kernels either
            **options,
        },
        console=QUIET,
    )
    return weights(result.adapter)


def test_job_makes_the_adapter_of_veneer_train(place: Path, tmp_path: Path, jobs: Jobs) -> None:
    """A job's adapter has the bytes that ``veneer train`` writes, and each of its passes took a turn."""
    file = jobs.upload(place / "train.jsonl")
    job = jobs.wait(jobs.create(file, "sums"))
    assert (job["status"], job["step"], job["steps"]) == ("succeeded", 12, 12)
    data = jobs.files.path(jobs.files.get(file) or {})
    assert weights(jobs.published.models["sums"]) == trained(place, tmp_path / "sums", data)
    assert jobs.turns >= 12 + 2
    assert len(jobs.bank) == 0
    steps = [message for message in jobs.messages(job["id"]) if message.startswith("Step ")]
    assert len(steps) == 12 and steps[-1].startswith("Step 12/12: training loss=")
    assert sorted(step for _, step in jobs.published.checkpoints) == [4, 8, 12]
    table = jobs.files.path(jobs.files.get(job["result_file"]) or {}).read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("step,train_loss") and len(table) == 13


def test_jobs_side_by_side_do_not_change_each_other(place: Path, tmp_path: Path, jobs: Jobs) -> None:
    """Two jobs at once and a third that waits end with the adapters that each has alone."""
    file = jobs.upload(place / "train.jsonl")
    data = jobs.files.path(jobs.files.get(file) or {})
    dora = {"adapter": {"method": "dora", "r": 3}}
    ids = [jobs.create(file, "one"), jobs.create(file, "two", seed=5), jobs.create(file, "three", **dora)]
    assert all(jobs.wait(job)["status"] == "succeeded" for job in ids)
    assert weights(jobs.published.models["two"]) == trained(place, tmp_path / "two", data, seed=5)
    alone = trained(place, tmp_path / "three", data, lora_dropout=0.0, method="dora", r=3)
    assert weights(jobs.published.models["three"]) == alone


def test_paused_job_goes_on_where_it_stopped(place: Path, tmp_path: Path, jobs: Jobs) -> None:
    """Pausing saves and frees the place; resuming ends with the same bytes."""
    file = jobs.upload(place / "train.jsonl")
    job = jobs.create(file, "long", training={**SHORT["training"], "steps": 20})
    jobs.wait(job, "running")
    wait(lambda: jobs.store[job]["step"] >= 3)
    assert jobs.store.move(job, "paused", "paused")
    wait(lambda: not jobs.queue.running)
    step = jobs.store[job]["step"]
    assert 3 <= step < 20
    assert jobs.store.move(job, "queued", "resumed")
    jobs.queue.wake()
    assert jobs.wait(job)["status"] == "succeeded"
    data = jobs.files.path(jobs.files.get(file) or {})
    assert weights(jobs.published.models["long"]) == trained(place, tmp_path / "long", data, steps=20)
    assert sum(message.startswith("Step ") for message in jobs.messages(job)) == 20


def test_cancelled_job_stays_cancelled(place: Path, jobs: Jobs) -> None:
    """A cancelled job stops after its round and publishes nothing."""
    job = jobs.create(jobs.upload(place / "train.jsonl"), training={**SHORT["training"], "steps": 5000})
    jobs.wait(job, "running")
    assert jobs.store.move(job, "cancelled", "cancelled")
    assert not jobs.store.move(job, "queued", "resumed")
    wait(lambda: not jobs.queue.running)
    assert jobs.store[job]["status"] == "cancelled" and not jobs.published.models


def test_job_cancelled_before_its_model_is_published(place: Path, jobs: Jobs) -> None:
    """A job that is cancelled after its last step is not published, and nothing tells of a model."""
    jobs.published.before_publishing = lambda job_id: jobs.store.move(job_id, "cancelled", "cancelled")
    job = jobs.wait(jobs.create(jobs.upload(place / "train.jsonl")))
    wait(lambda: not jobs.queue.running)
    assert job["status"] == "cancelled" and job["result_file"] is None and not jobs.published.models
    assert jobs.messages(job["id"])[-1] == "cancelled"


def test_restarted_server_goes_on(place: Path, tmp_path: Path, base: Base) -> None:
    """A job that was running when the server stopped goes on at the next start, and its events are recorded once."""
    first = Jobs(tmp_path / "state", base)
    first.queue.start()
    file = first.upload(place / "train.jsonl")
    job = first.create(file, "sums", training={**SHORT["training"], "steps": 24})
    first.wait(job, "running")
    wait(lambda: first.store[job]["step"] >= 2)
    first.close()
    second = Jobs(tmp_path / "state", base)
    assert second.store[job]["status"] == "running"
    second.queue.start()
    assert second.wait(job)["status"] == "succeeded"
    messages = second.messages(job)
    assert sum(message.startswith("Step ") for message in messages) == 24
    assert messages.count("The server was restarted; the job goes on from its last checkpoint") == 1
    second.close()


def test_job_that_would_not_fit_is_refused(place: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that needs more memory than there is fails before its first step, with options that would fit; the next one runs."""
    from veneer.training import process_memory

    file = jobs.upload(place / "train.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(process_memory, "free", lambda: -(10**8))
        job = jobs.wait(jobs.create(file, adapter={"r": 64}))
    error = json.loads(job["error"])
    assert (job["status"], job["step"], error["code"], error["param"]) == ("failed", 0, "memory", "training")
    assert "of memory at its peak" in error["message"] and "--" not in error["message"], error
    assert not [message for message in jobs.messages(job["id"]) if message.startswith("Step ")]
    assert jobs.wait(jobs.create(file, "next"))["status"] == "succeeded"


def test_file_that_cannot_be_trained_fails_the_job(tmp_path: Path, jobs: Jobs) -> None:
    """A job on bad rows fails with the report and the parameter."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"other": 1}\n', encoding="utf-8")
    job = jobs.wait(jobs.create(jobs.upload(rows)))
    error = json.loads(job["error"])
    assert job["status"] == "failed" and error["param"] == "training_file"
    assert error["code"] == "invalid_training_file" and ":2" in error["message"]
