"""Files and fine-tuning jobs through the openai client."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.project.source import ROOT
from tests.serve.api.made import KEY, Running, wait
from tests.training.made import write_rows

from veneer.serve.limits import ServeLimits

OVER = ("succeeded", "failed", "cancelled")
SHORT: Any = {"training": {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 1, "save_every": 3}, "adapter": {"r": 2}}
LONG: Any = {**SHORT, "training": {**SHORT["training"], "steps": 3000, "save_every": 1000}}
BATCH: Any = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}}


@pytest.fixture(scope="module")
def server(place: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that keeps few bytes."""
    limits = ServeLimits(max_file_bytes=100_000, max_files_bytes=300_000, max_jobs=8)
    running = Running(place / "base", tmp_path_factory.mktemp("state"), adapters, limits=limits)
    yield running
    running.close()


@pytest.fixture(scope="module")
def file(server: Running, place: Path) -> str:
    """The id of an uploaded file of examples."""
    with (place / "train.jsonl").open("rb") as content:
        return server.client().files.create(file=content, purpose="fine-tune").id


def ended(client: openai.OpenAI, job: str) -> Any:
    """A job when it is over."""
    wait(lambda: client.fine_tuning.jobs.retrieve(job).status in OVER)
    return client.fine_tuning.jobs.retrieve(job)


def test_files(client: openai.OpenAI, place: Path, tmp_path: Path) -> None:
    """A file is stored, listed, read back byte by byte and deleted; its name is only shown."""
    content = (place / "valid.jsonl").read_bytes()
    made = client.files.create(
        file=("../../rows.jsonl", content), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.bytes == len(content) and made.expires_at == made.created_at + 3600 and "/" not in made.filename
    assert client.files.retrieve(made.id).id == made.id
    assert client.files.content(made.id).read() == content
    assert client.files.wait_for_processing(made.id).status == "processed"
    others = [client.files.create(file=("b.jsonl", b"{}"), purpose="fine-tune").id for _ in range(3)]
    listed = [entry.id for entry in client.files.list(limit=2, order="asc")]
    assert listed[-4:] == [made.id, *others]
    for one in [made.id, *others]:
        assert client.files.delete(one).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("big.jsonl", b"x" * 150_000), purpose="fine-tune")
    assert error.value.status_code == 413 and error.value.param == "file"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.files.create(file=("a.jsonl", b"{}"), purpose="vision")
    assert wrong.value.param == "purpose"


def test_two_jobs_at_once_and_a_chat_with_each(client: openai.OpenAI, file: str) -> None:
    """Two jobs run side by side; their models answer, are listed with events, checkpoints and results, and can be deleted."""
    jobs = [
        client.fine_tuning.jobs.create(
            model="base",
            training_file=file,
            suffix=name,
            seed=seed,
            method=BATCH,
            metadata={"team": name},
            extra_body=SHORT,
        )
        for seed, name in enumerate(("first", "second"))
    ]
    assert jobs[0].status == "queued" and jobs[0].fine_tuned_model is None and jobs[0].seed == 0
    done = [ended(client, job.id) for job in jobs]
    assert [job.status for job in done] == ["succeeded"] * 2
    assert [job.fine_tuned_model for job in done] == ["first", "second"]
    assert done[0].trained_tokens > 0 and done[0].finished_at >= done[0].created_at
    answers = {
        model: client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "1+2"}], max_tokens=4, temperature=0
        )
        for model in ("first", "second", "first:step-3")
    }
    assert all(answer.choices[0].message.content is not None for answer in answers.values())
    events = list(client.fine_tuning.jobs.list_events(jobs[0].id, limit=3))
    assert len({event.id for event in events}) == len(events) >= 10
    assert events[0].message == "The job has successfully completed" and events[-1].message.startswith("Created")
    assert sum(event.type == "metrics" for event in events) == 6
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(jobs[0].id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    assert checkpoints[0].metrics.train_loss > 0
    table = client.files.content(done[0].result_files[0]).text
    assert table.startswith("step,train_loss") and len(table.splitlines()) == 7
    found = client.fine_tuning.jobs.list(metadata={"team": "second"})
    assert [job.id for job in found] == [jobs[1].id]
    assert client.models.delete("second").deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="second", messages=[{"role": "user", "content": "1+2"}])


def test_the_code_of_the_page_runs(
    server: Running, client: openai.OpenAI, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python blocks of docs/serving.md run as printed; only address, base, file and size of the job differ."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    for printed, here in {
        "http://127.0.0.1:8000/v1": server.server.url,
        "smollm2-135m": "base",
        "rows.jsonl": "train.jsonl",
        '"r": 16': '"r": 2',
        '"steps": 200': '"steps": 2',
        'suffix="sql"': 'suffix="page"',
    }.items():
        assert printed in code
        code = code.replace(printed, here)
    monkeypatch.chdir(place)
    monkeypatch.setenv("VENEER_API_KEY", KEY)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    names["client"].close()
    assert names["answer"].model == "sql" and names["answer"].usage.completion_tokens > 0
    assert ended(client, names["job"].id).fine_tuned_model == "page"


def test_job_starts_from_a_model(client: openai.OpenAI, file: str) -> None:
    """A job whose model is an adapter goes on training a copy of it."""
    job = client.fine_tuning.jobs.create(
        model="sql", training_file=file, suffix="more", method=BATCH, extra_body={"training": SHORT["training"]}
    )
    assert ended(client, job.id).status == "succeeded", client.fine_tuning.jobs.retrieve(job.id).error
    with pytest.raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="sql", training_file=file, method=BATCH, extra_body={"adapter": {"r": 64}})
    assert error.value.param == "adapter"


def test_pause_resume_and_cancel(client: openai.OpenAI, file: str) -> None:
    """A job is paused, resumed and cancelled; what does not fit its status is a conflict that is not retried."""
    job = client.fine_tuning.jobs.create(model="base", training_file=file, method=BATCH, extra_body=LONG)
    wait(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.ConflictError) as conflict:
        client.fine_tuning.jobs.resume(job.id)
    assert conflict.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.ConflictError):
        client.files.delete(file)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model is None


def test_repeated_requests_make_one_job(server: Running, file: str) -> None:
    """A retry, and a request with the same Idempotency-Key, mean the job that exists; other requests make other jobs."""
    client = server.client()
    asked: Any = {"model": "base", "training_file": file, "method": BATCH, "extra_body": {**LONG, "seed": 11}}
    first = client.fine_tuning.jobs.create(**asked)
    retried = client.fine_tuning.jobs.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert retried.id == first.id
    other = client.fine_tuning.jobs.create(**asked)
    assert other.id != first.id
    keyed = [client.fine_tuning.jobs.create(**asked, extra_headers={"Idempotency-Key": "k"}).id for _ in range(2)]
    assert keyed[0] == keyed[1] not in (first.id, other.id)
    changed: Any = {**asked, "extra_body": {**LONG, "seed": 12}}
    with pytest.raises(openai.ConflictError) as error:
        client.fine_tuning.jobs.create(**changed, extra_headers={"Idempotency-Key": "k"})
    assert error.value.code == "idempotency_key_reused"
    for job in {first.id, other.id, keyed[0]}:
        client.fine_tuning.jobs.cancel(job)


def test_wrong_requests_for_jobs(client: openai.OpenAI, file: str, place: Path) -> None:
    """Each mistake is a 400 that names its parameter; a file that cannot be trained comes with its report."""
    bad = client.files.create(file=("rows.jsonl", b'{"other": 1}\n'), purpose="fine-tune").id
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("training_file", {"training_file": "file-none"}, "there is no file"),
        ("training_file", {"training_file": bad}, ":1"),
        ("suffix", {"suffix": "a/b"}, "suffix"),
        ("suffix", {"suffix": "a.step-1"}, "checkpoints"),
        ("adapter.rank", {"extra_body": {"adapter": {"rank": 4}}}, "did you mean r"),
        ("adapter.r", {"extra_body": {"adapter": {"r": 0}}}, "greater than or equal to 1"),
        ("training.data", {"extra_body": {"training": {"data": "/etc/passwd"}}}, "no option"),
        ("training.init_from", {"extra_body": {"training": {"init_from": "x"}}}, "no option"),
        ("method.type", {"method": {"type": "dpo"}}, "supervised"),
        ("integrations", {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "at most 0"),
        ("hyperparameters.n_epochs", {"hyperparameters": {"n_epochs": 0}}, "greater than or equal to 1"),
        ("lora_r", {"extra_body": {"lora_r": 4}}, "unknown parameter"),
    ]
    for param, options, text in cases:
        with pytest.raises(openai.BadRequestError) as error:
            client.fine_tuning.jobs.create(**{"model": "base", "training_file": file, **options})
        assert (error.value.param or "").startswith(param), (param, error.value.body)
        assert text in error.value.message, error.value.message
        assert "files/" not in error.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        client.fine_tuning.jobs.create(model="none", training_file=file)
    assert unknown.value.param == "model"


def test_routes_of_hosted_services_are_named(client: openai.OpenAI) -> None:
    """Permissions, graders and uploads in parts are not here, and say so."""
    for call in (
        lambda: client.fine_tuning.checkpoints.permissions.create("ftckpt-1", project_ids=["p"]),
        lambda: client.fine_tuning.alpha.graders.validate(grader={"type": "string_check"}),  # type: ignore[typeddict-item]
        lambda: client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="fine-tune"),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            call()
        assert error.value.status_code == 501 and error.value.code == "not_implemented"


def test_failed_job_tells_why(server: Running, client: openai.OpenAI, tmp_path: Path, monkeypatch: Any) -> None:
    """A file that is too large to be checked at once is checked when its job starts; the job fails with the report."""
    monkeypatch.setattr("veneer.serve.api.routes.fine_tuning.CHECKED_BYTES", 0)
    rows = write_rows(tmp_path / "rows.jsonl", 3).read_bytes() + b'{"other": 1}\n'
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="base", training_file=file, extra_body=SHORT)
    assert job.status == "validating_files"
    failed = ended(client, job.id)
    assert failed.status == "failed" and failed.error.param == "training_file"
    assert failed.error.code == "invalid_training_file" and ":4" in failed.error.message
    assert "files/" not in failed.error.message
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


@pytest.mark.slow
def test_restarted_server_has_models_and_jobs(place: Path, tmp_path: Path) -> None:
    """Jobs that were queued and running, their files and finished models are there after a restart."""
    first = Running(place / "base", tmp_path / "state", parallel_jobs=1)
    client = first.client()
    with (place / "train.jsonl").open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune").id
    asked: Any = {"model": "base", "training_file": file, "method": BATCH}
    done = client.fine_tuning.jobs.create(**asked, suffix="done", extra_body=SHORT)
    ended(client, done.id)
    slow = {**SHORT, "training": {**SHORT["training"], "steps": 60}}
    running = client.fine_tuning.jobs.create(**asked, suffix="running", extra_body=slow)
    queued = client.fine_tuning.jobs.create(**asked, suffix="queued", extra_body=SHORT)
    wait(lambda: client.fine_tuning.jobs.retrieve(running.id).status == "running")
    time.sleep(0.2)
    first.close()
    second = Running(place / "base", tmp_path / "state", parallel_jobs=1)
    client = second.client()
    assert {"done", "done:step-6"} <= {model.id for model in client.models.list()}
    assert [ended(client, job.id).status for job in (running, queued)] == ["succeeded"] * 2
    assert {"done", "running", "queued"} <= {model.id for model in client.models.list()}
    steps = [event for event in client.fine_tuning.jobs.list_events(running.id, limit=100) if event.type == "metrics"]
    assert sorted(json.loads(json.dumps(event.data))["step"] for event in steps) == list(range(1, 61))
    second.close()
