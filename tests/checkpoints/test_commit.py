"""The commit protocol under faults: whatever fails or dies at whatever moment, a good checkpoint stands and nothing damaged is taken."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import newest

from veneer.checkpoints import commit as protocol
from veneer.checkpoints.commit import LATEST, MANIFEST, candidates, commit, sweep, verified
from veneer.checkpoints.run_state import read_state, write_state
from veneer.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of real syncs would wait for whatever else the machine writes; that they are asked for, and when, is what is tested."""
    monkeypatch.setattr(os, "fsync", lambda handle: os.fstat(handle))


class Dead(BaseException):
    """The process is gone: nothing that it would have done after this happens."""


def content(number: int) -> Callable[[Path], None]:
    """Two files whose bytes depend on a number."""

    def write(folder: Path) -> None:
        (folder / "tensors").write_bytes(bytes([number % 256]) * 500)
        (folder / "state.json").write_text(json.dumps({"number": number}))

    return write


def number_of(folder: Path | None) -> int | None:
    """Which content a checkpoint holds; it must hold all of it."""
    if folder is None:
        return None
    number = json.loads((folder / "state.json").read_text())["number"]
    assert (folder / "tensors").read_bytes() == bytes([number % 256]) * 500
    return int(number)


def put(parent: Path, number: int, **options: Any) -> Path:
    return commit(parent, f"step-{number:08d}", content(number), **options)


EFFECTS = [(os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (Path, "open")]
"""What the protocol does to the disk. Reading is among it (``open``), since a disk may fail there too."""


class Disk:
    """Counts what is done to the disk, and has one of it fail, or the process die before it."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException | None = None, when: int = 0) -> None:
        self.count = 0
        self.struck = False
        for owner, name in EFFECTS:
            patch.setattr(owner, name, self._wrapped(getattr(owner, name), error, when))

    def _wrapped(self, real: Callable[..., Any], error: BaseException | None, when: int) -> Callable[..., Any]:
        def effect(*args: Any, **options: Any) -> Any:
            self.count += 1
            if isinstance(error, Dead) and self.struck:
                raise error
            if error is not None and self.count == when:
                self.struck = True
                raise error
            return real(*args, **options)

        return effect


def effects_of(tmp_path: Path, prepare: Callable[[Path], object]) -> int:
    """How many effects one commit has."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(tmp_path / "count")
        disk = Disk(patch)
        put(tmp_path / "count", 9)
        return disk.count


def before(parent: Path) -> None:
    """Two checkpoints, so that a third has one to delete."""
    for number in (1, 2):
        put(parent, number)


def test_a_commit_is_found_and_pointed_to(tmp_path: Path) -> None:
    """A committed checkpoint verifies, is the newest, and LATEST names it; nothing lies aside."""
    folder = put(tmp_path, 3)
    assert verified(folder) and newest(tmp_path) == folder
    assert (tmp_path / LATEST).read_text() == folder.name
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, folder.name]


def test_death_before_any_effect_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """The process dies before each effect in turn; the newest good checkpoint is the last one before, or the new one whole."""
    total = effects_of(tmp_path, before)
    seen = set()
    for when in range(1, total + 1):
        parent = tmp_path / str(when)
        before(parent)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, Dead(), when)
            with pytest.raises(Dead):
                put(parent, 3)
        sweep(parent)
        seen.add(number_of(newest(parent)))
        assert [path.name for path in parent.iterdir() if ".tmp-" in path.name] == []
        put(parent, 4)
        assert number_of(newest(parent)) == 4
    assert total > 15 and seen == {2, 3}


def test_death_while_the_only_checkpoint_is_replaced_leaves_one(tmp_path: Path) -> None:
    """A checkpoint is written again under its own name, with no other beside it: one of the two is there at every moment."""

    def only(parent: Path) -> None:
        put(parent, 9)

    total = effects_of(tmp_path, only)
    for when in range(1, total + 1):
        parent = tmp_path / str(when)
        only(parent)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, Dead(), when)
            with pytest.raises(Dead):
                put(parent, 9)
        sweep(parent)
        assert number_of(newest(parent)) == 9
        assert [path.name for path in parent.iterdir() if ".tmp-" in path.name] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_once_costs_this_checkpoint_at_most(tmp_path: Path, code: int) -> None:
    """Each effect in turn fails; what was committed stands, what is half done is cleaned up, and the next commit succeeds."""
    total = effects_of(tmp_path, before)
    for when in range(1, total + 1):
        parent = tmp_path / str(when)
        before(parent)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, OSError(code, os.strerror(code)), when)
            failed = False
            try:
                put(parent, 3)
            except (OSError, CheckpointError):
                failed = True
        assert number_of(newest(parent)) == 3 or (failed and number_of(newest(parent)) == 2)
        put(parent, 4)
        assert number_of(newest(parent)) == 4


def test_a_fault_at_every_named_point_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at each of the protocol's own points: until the rename the old checkpoint counts, from then on the new one."""
    points: list[str] = []
    monkeypatch.setattr(protocol, "at", points.append)
    before(tmp_path / "points")
    points.clear()
    put(tmp_path / "points", 3)
    found = {}
    for point in points:
        parent = tmp_path / point.replace(" ", "-")
        monkeypatch.setattr(protocol, "at", lambda _: None)
        before(parent)

        def strike(name: str, wanted: str = point) -> None:
            if name == wanted:
                raise Dead

        monkeypatch.setattr(protocol, "at", strike)
        with pytest.raises(Dead):
            put(parent, 3)
        found[point] = number_of(newest(parent))
    renamed = points.index("renamed")
    assert points == ["made aside", "files written", "manifest written", *points[renamed:]]
    assert list(found.values()) == [2] * renamed + [3] * (len(points) - renamed)


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail: each file and the folder are synced before the rename, the parent after it, and only then LATEST moves."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not tell which file a handle is of")
    course: list[tuple[str, str]] = []
    real = {"fsync": os.fsync, "rename": Path.rename, "replace": Path.replace}

    def fsync(handle: int) -> None:
        course.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name.partition(".tmp-")[0]))
        real["fsync"](handle)

    def moved(how: str) -> Callable[[Path, Path], Path]:
        def move(self: Path, target: Path) -> Path:
            course.append((how, Path(target).name))
            return Path(str(real[how](self, target)))

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", moved("rename"))
    monkeypatch.setattr(Path, "replace", moved("replace"))
    put(tmp_path / "checkpoints", 3)
    rename, point = course.index(("rename", "step-00000003")), course.index(("replace", LATEST))
    synced = {name for what, name in course[:rename] if what == "sync"}
    assert synced == {"state.json", "tensors", MANIFEST, "step-00000003"}
    assert ("sync", "checkpoints") in course[rename:point]
    assert ("sync", LATEST) in course[rename:point] and ("sync", "checkpoints") in course[point:]


def flip(file: Path, bit: int) -> None:
    with file.open("r+b", buffering=0) as handle:
        handle.seek(bit // 8)
        byte = handle.read(1)[0]
        handle.seek(bit // 8)
        handle.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """Each bit of the manifest, and a thousand random ones of the files: the checkpoint no longer verifies and the one before counts."""
    old, new = put(tmp_path, 1), put(tmp_path, 2)
    rng = random.Random(0)
    places = [(new / MANIFEST, bit) for bit in range(8 * (new / MANIFEST).stat().st_size)]
    files = [new / "tensors", new / "state.json"]
    places += [(file, rng.randrange(8 * file.stat().st_size)) for file in rng.choices(files, k=1000)]
    missed = []
    for file, bit in places:
        flip(file, bit)
        if newest(tmp_path) != old:
            missed.append((file.name, bit))
        flip(file, bit)
    assert missed == [] and newest(tmp_path) == new


@pytest.mark.parametrize("harm", ["cut", "longer", "missing", "more", "no manifest", "empty manifest"])
def test_a_folder_that_is_not_its_manifest_does_not_verify(tmp_path: Path, harm: str) -> None:
    """Files that are shorter, longer, gone or too many, and a manifest that is none."""
    folder = put(tmp_path, 1)
    file = folder / "tensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif harm == "missing":
        file.unlink()
    elif harm == "more":
        (folder / "another").write_bytes(b"")
    elif harm == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("")
    assert not verified(folder) and newest(tmp_path) is None


def test_pruning_counts_good_checkpoints_only(tmp_path: Path) -> None:
    """Two good ones are kept; a damaged one between them is not counted as one of the two."""
    for number in (1, 2, 3):
        put(tmp_path, number, keep=3)
    (tmp_path / "step-00000003" / "tensors").write_bytes(b"damaged")
    put(tmp_path, 4, keep=2)
    assert [number for number in (4, 2, 1) if verified(tmp_path / f"step-{number:08d}")] == [4, 2]
    assert not (tmp_path / "step-00000001").exists()


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """A run that was damaged goes over the same steps once more."""
    folder = put(tmp_path, 1)
    (folder / "tensors").write_bytes(b"damaged")
    assert verified(put(tmp_path, 1)) and candidates(tmp_path) == [folder]


def test_what_does_not_read_back_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that returns other bytes than it was given is told, LATEST stays where it was and nothing is deleted."""
    before(tmp_path)

    def corrupt(point: str) -> None:
        if point == "renamed":
            (tmp_path / "step-00000003" / "tensors").write_bytes(b"other")

    monkeypatch.setattr(protocol, "at", corrupt)
    with pytest.raises(CheckpointError, match="does not read back"):
        put(tmp_path, 3)
    assert number_of(newest(tmp_path)) == 2 and (tmp_path / LATEST).read_text() == "step-00000002"
    assert (tmp_path / "step-00000001").is_dir()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow beyond ``size`` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 10, 200, 5000])
def test_a_state_that_finds_no_room_is_an_error_of_the_system(tmp_path: Path, size: int) -> None:
    """However far writing got, the error is an OSError with the file's name, and the state saved before is whole."""
    tensors = {"adapter/a/site/lora_A": torch.arange(2000.0)}
    commit(tmp_path, "step-00000001", lambda folder: write_state(folder, tensors, {"round": 1}))
    with largest_file(size), pytest.raises(OSError) as caught:
        commit(tmp_path, "step-00000002", lambda folder: write_state(folder, tensors, {"round": 2}))
    assert caught.value.errno == errno.EFBIG and "tensors" in str(caught.value)
    found = newest(tmp_path)
    assert found is not None and [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []
    read, state = read_state(found)
    assert state == {"round": 1} and torch.equal(read["adapter/a/site/lora_A"], tensors["adapter/a/site/lora_A"])
