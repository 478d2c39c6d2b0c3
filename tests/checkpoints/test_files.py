"""File tricks: what is not a regular file of the folder is refused at once, and what cannot be written leaves nothing behind."""

from __future__ import annotations

import builtins
import errno
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import make_folder, outputs, tensor_bytes
from tests.tiny import tiny

import veneer
from veneer import LoRA
from veneer.checkpoints import files, read_adapter
from veneer.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
Trick = Callable[[Path, Path], None]


def link_to_file(path: Path, aside: Path) -> None:
    (aside / "real").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(aside / "real")


def link_inside(path: Path, aside: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def link_to_folder(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to(aside)


def link_to_itself(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def links_in_a_circle(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to("other")
    path.with_name("other").symlink_to(path.name)


def link_to_nothing(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_environment(path: Path, aside: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/environ")


def pipe(path: Path, aside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path, aside: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # endless zeros
    except PermissionError:
        pytest.skip("only root can make a device")


def folder(path: Path, aside: Path) -> None:
    path.unlink()
    path.mkdir()


def at_socket(path: Path, aside: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def empty(path: Path, aside: Path) -> None:
    path.write_bytes(b"")


def sparse(path: Path, aside: Path) -> None:
    """A terabyte that takes no room, with a header that matches it."""
    header = (
        b'{"base_model.model.x.lora_A.weight":{"dtype":"F32","shape":[4096,67108864],"data_offsets":[0,1099511627776]}}'
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))


SAYS: dict[Trick, str] = {
    link_to_file: "symbolic link",
    link_inside: "symbolic link",
    link_to_folder: "symbolic link",
    link_to_itself: "symbolic link",
    links_in_a_circle: "symbolic link",
    link_to_nothing: "symbolic link",
    link_to_environment: "symbolic link",
    pipe: "is a named pipe",
    device: "is a device|is a socket or device",
    folder: "is a folder",
    at_socket: "is a socket",
    empty: "0 bytes|is not usable JSON",
    sparse: "at most|must be 1 to|at most 2,097,152",
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="these files are those of POSIX")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("trick", SAYS, ids=lambda trick: trick.__name__)
def test_what_is_no_regular_file_is_refused_at_once(trick: Trick, name: str, tmp_path: Path) -> None:
    """Links, pipes, sockets, devices, folders, empty and endless files: refused in one sentence and under 50 ms of work, without
    reading, waiting or following."""
    aside = tmp_path / "aside"
    aside.mkdir()
    target = make_folder(tmp_path / "a")
    trick(target / name, aside)
    refuse_soon(target, SAYS[trick])


def refuse_soon(path: Path, says: str) -> None:
    """Reading must be refused in one line, in under 50 ms of work and without waiting; slow moments of the machine aside."""
    took = []
    for _ in range(3):
        start, worked = time.perf_counter(), time.process_time()
        with pytest.raises(CheckpointError, match=says) as caught:
            read_adapter(path)
        took.append((time.process_time() - worked, time.perf_counter() - start))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert min(work for work, _ in took) < 0.05
    assert min(wall for _, wall in took) < 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="these files are those of POSIX")
@pytest.mark.parametrize("trick", [link_to_itself, links_in_a_circle, link_to_nothing, pipe, device, at_socket])
def test_what_is_no_folder_is_refused_at_once(trick: Trick, tmp_path: Path) -> None:
    """The same where the folder should be: nothing is waited for, and no circle is followed."""
    place = tmp_path / "place"
    place.touch()
    trick(place, tmp_path)
    refuse_soon(place, "is not a folder|does not exist|symbolic link|socket or device")


def test_a_hard_link_is_a_regular_file(tmp_path: Path) -> None:
    """A hard link cannot be told from the file itself, and reads as one."""
    target = make_folder(tmp_path / "a")
    os.link(target / WEIGHTS, tmp_path / "other")
    assert read_adapter(target).num_parameters() == 512


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission denied is one sentence with the path."""
    target = make_folder(tmp_path / "a")
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(WEIGHTS):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, refuse})
    with pytest.raises(CheckpointError, match=r"safetensors cannot be read: Permission denied"):
        read_adapter(target)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions are those of POSIX")
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "."])
def test_without_permission_it_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder that this user may not read is refused at once, with its path and the reason."""
    target = make_folder(tmp_path / "a")
    monkeypatch.chdir(target)  # so that the folders above need no permission
    (target / name).chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may read everything
    try:
        refuse_soon(Path(), f"{re.escape(name)} cannot be read: Permission denied")
    finally:
        if root:
            os.seteuid(0)
        (target / name).chmod(0o755)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "chat_template.jinja"])
def test_names_that_differ_in_case_alone_are_refused(name: str, tmp_path: Path) -> None:
    """Two files of which another file system would keep one: which is meant is not guessed, nor is one taken for the other."""
    target = make_folder(tmp_path / "a")
    (target / name).touch()
    twin = name.title()
    (target / twin).write_bytes(b"{}")
    if len(list(target.iterdir())) == len({path.name.lower() for path in target.iterdir()}):
        pytest.skip("names differ by more than case here")
    refuse_soon(target, f"holds {name} and {twin}, whose names differ in case alone")
    (target / name).unlink()
    if not name.endswith("jinja"):
        refuse_soon(target, f"holds {twin}; expected {name}: rename it")


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """What the user names is followed (runs/last may point to a step); what lies in it is not."""
    make_folder(tmp_path / "step-100")
    (tmp_path / "last").symlink_to("step-100")
    assert len(read_adapter(tmp_path / "last").tensors) == 2


def test_the_hubs_cache_is_read(tmp_path: Path) -> None:
    """A download cache keeps files as links from snapshots into its own blobs: followed there, and nowhere else."""
    blobs = make_folder(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in (WEIGHTS, "adapter_config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert len(read_adapter(snapshot).tensors) == 2
    (tmp_path / "outside").write_bytes((blobs / WEIGHTS).read_bytes())
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../outside")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_adapter(snapshot)
    (blobs / "chain").symlink_to("../outside")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../blobs/chain")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_adapter(snapshot)


@pytest.mark.parametrize("path", ["nul\x00byte", "no/such/folder", "f" * 300, "f" * 100_000, "folder/" * 2000])
def test_odd_paths_are_one_sentence(path: str, tmp_path: Path) -> None:
    """A path that cannot be, is not there or is too long ends in our error, which is no longer for it."""
    refuse_soon(tmp_path / path, "cannot be a path|does not exist|too long")


def test_a_file_for_a_folder_says_what_was_expected(tmp_path: Path) -> None:
    """The path of the weights means their folder; that of any other file is refused."""
    target = make_folder(tmp_path / "a")
    assert read_adapter(target / WEIGHTS).tensors.keys() == read_adapter(target).tensors.keys()
    with pytest.raises(CheckpointError, match="is not a folder; expected a folder with adapter_config"):
        read_adapter(target / "adapter_config.json")


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file shrinks after its header was checked: a short read, not a crash."""
    target = make_folder(
        tmp_path / "a",
        tensor_bytes(
            {
                "base_model.model.x.lora_A.weight": torch.zeros(4, 4096),
                "base_model.model.x.lora_B.weight": torch.zeros(8, 4),
            }
        ),
    )
    (target / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}'
    )
    from veneer.checkpoints.peft import read as peft_read

    real = peft_read.read_tensors

    def cut(*args: Any) -> Any:
        os.truncate(target / WEIGHTS, 1000)
        return real(*args)

    monkeypatch.setattr(peft_read, "read_tensors", cut)
    with pytest.raises(CheckpointError, match="ended after"):
        read_adapter(target)


def test_a_file_changed_after_it_was_looked_through_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are looked at again once they are kept: what is written into the file in between is seen, and so is a cut."""
    target = make_folder(tmp_path / "a")
    from veneer.checkpoints.peft import read as peft_read

    real = peft_read.check_stored

    def spoil(*args: Any) -> None:
        real(*args)
        with (target / WEIGHTS).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\xff\xff\xff\x7f")

    monkeypatch.setattr(peft_read, "check_stored", spoil)
    with pytest.raises(CheckpointError, match="1 of 128 numbers are not finite"):
        read_adapter(target)

    def cut(*args: Any) -> None:
        os.truncate(target / WEIGHTS, 1000)
        real(*args)

    monkeypatch.setattr(peft_read, "check_stored", cut)
    with pytest.raises(CheckpointError, match="ended after"):
        read_adapter(target)


def test_a_file_exchanged_while_it_is_opened_never_escapes(tmp_path: Path) -> None:
    """Another thread swaps the file for a link to a secret and back, a thousand times: the secret is never read."""
    target = make_folder(tmp_path / "a")
    good = (target / "adapter_config.json").read_bytes()
    secret = tmp_path / "secret"
    secret.write_bytes(good.replace(b'"r": 4', b'"r": 3'))
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for make in (lambda p: p.symlink_to(secret), lambda p: p.write_bytes(good)):
                fresh = target / "fresh"
                make(fresh)
                fresh.replace(target / "adapter_config.json")

    thread = threading.Thread(target=swap)
    thread.start()
    read = 0
    said: set[str] = set()
    try:
        for _ in range(1000):
            try:
                with files.Folder(target) as opened:
                    assert opened.read("adapter_config.json", 1 << 20) == good
                read += 1
            except CheckpointError as error:
                said.add(str(error).partition(" is ")[2][:15] or str(error))
    finally:
        stop.set()
        thread.join()
    assert read > 10
    assert said <= {"a symbolic link"}


def saved(tmp_path: Path) -> tuple[Any, Path]:
    bank = veneer.attach(tiny("llama"))
    bank.add("a", LoRA(r=2, target_modules=("q_proj",)))
    bank.save("a", tmp_path / "out")
    return bank, tmp_path / "out"


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=lambda code: errno.errorcode[code]
)
@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("there", [False, True], ids=["new", "over"])
def test_a_disk_that_fails_leaves_what_was_there(
    code: int, nth: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th write, flush or rename fails: one sentence, the old folder or none, and nothing half-written beside it."""
    bank, out = saved(tmp_path)
    bank.add("b", LoRA(r=3, target_modules=("v_proj",)))
    target = out if there else tmp_path / "fresh"
    before = snapshot(tmp_path)
    calls = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "open", failing(Path.open))
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .*; nothing was changed there" if nth <= 6 else "did not confirm"
    ):
        bank.save("b", target)
    assert (snapshot(tmp_path) == before) == (nth <= 6)


def test_a_folder_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    """The place is a file, or lies below one."""
    bank, _ = saved(tmp_path)
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            bank.save("a", target)
    assert (tmp_path / "file").read_text() == "x"


def test_what_does_not_read_back_equal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lies is found out before the folder counts as written."""
    bank, _ = saved(tmp_path)
    real = builtins.open
    from veneer.checkpoints.peft import write as peft_write

    write = peft_write.write_folder

    def lie(path: Path, pieces: Any) -> None:
        write(path, pieces)
        raw = bytearray((path / WEIGHTS).read_bytes())
        raw[-1] ^= 1
        with real(path / WEIGHTS, "wb") as file:
            file.write(raw)

    monkeypatch.setattr(peft_write, "write_folder", lie)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        bank.save("a", tmp_path / "b")


def test_writing_over_an_adapter_keeps_what_else_is_in_the_folder(tmp_path: Path) -> None:
    """A folder is overwritten file by file: notes beside the adapter stay."""
    bank, out = saved(tmp_path)
    (out / "notes.txt").write_text("mine")
    bank.add("b", LoRA(r=3, target_modules=("v_proj",)))
    bank.save("b", out)
    assert (out / "notes.txt").read_text() == "mine"
    assert set(read_adapter(out).tensors) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS, "notes.txt"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Files that were never moved to their place go when the folder is written again."""
    bank, out = saved(tmp_path)
    (out / f"{WEIGHTS}.tmp-0123abcd").write_text("half")
    bank.save("a", out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


def test_a_bank_with_its_folder_format_can_be_pickled(tmp_path: Path) -> None:
    """The folder format travels with a copied model and still reads and writes."""
    import copy

    bank, out = saved(tmp_path)
    twin = veneer.bank_of(copy.deepcopy(bank.model))
    assert twin is not None
    twin.load(out, name="again")
    with twin.use("again"):
        assert outputs(twin.model).isfinite().all()
