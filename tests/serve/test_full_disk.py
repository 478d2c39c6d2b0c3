"""A server whose disk is full: clear errors, answers go on, and what a client deletes is free again. Needs the right to mount a folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.api.made import Running, wait, write_adapters

from veneer import LoRA

HELLO: Any = [{"role": "user", "content": "Hello"}]
pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with four megabytes of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small folder is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all room."""
    file = folder / "filling"
    with file.open("wb", buffering=0) as out:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    out.write(b"x" * size)
            except OSError:
                pass
    return file


@pytest.mark.timeout(600)
def test_full_disk_is_an_error_and_the_server_goes_on(
    place: Path, tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploads are refused with 507, a running job fails with the reason, answers and lists go on, and deleting makes room."""
    write_adapters(place / "base", tmp_path / "adapters", {"sql": LoRA(r=2)})
    running = Running(place / "base", small / "state", tmp_path / "adapters", parallel_jobs=1)
    with running.client() as client:
        rows = (place / "train.jsonl").read_bytes()
        kept = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
        large = client.files.create(file=("large.jsonl", b"{}\n" * 100_000), purpose="fine-tune").id
        asked: Any = {
            "model": "base",
            "training_file": kept,
            "extra_body": {"adapter": {"r": 2}, "training": {"steps": 100_000, "save_every": 50}},
        }
        job = client.fine_tuning.jobs.create(**asked)
        wait(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
        filling = fill(small)
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("more.jsonl", b"{}\n" * 50_000), purpose="fine-tune")
        assert (
            refused.value.status_code == 507
            and refused.value.code == "disk"
            and "free some space" in str(refused.value)
        )
        assert client.chat.completions.create(model="sql", messages=HELLO, max_tokens=4).usage
        assert {file.id for file in client.files.list()} == {kept, large}
        wait(lambda: any(job.id in record.getMessage() for record in caplog.records), 60)  # its end waits for room
        filling.unlink()
        wait(lambda: client.fine_tuning.jobs.retrieve(job.id).status != "running", 60)
        failed = client.fine_tuning.jobs.retrieve(job.id)
        assert failed.status == "failed" and failed.error is not None and "free some space" in failed.error.message
        assert client.files.delete(large).deleted
        again = client.fine_tuning.jobs.create(**{**asked, "extra_body": {"training": {"steps": 5}}})
        wait(lambda: client.fine_tuning.jobs.retrieve(again.id).status == "succeeded", 60)
    assert not [path for path in (small / "state" / "files").iterdir() if path.name.startswith(".")]
    running.close()
