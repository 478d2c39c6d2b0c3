"""Several processes that train together: data parallel, with every adapter whole in each of them.

    torchrun --nproc-per-node 4 -m veneer train ...           or           veneer train --processes 4 ...

Each process has the base, all adapters and all optimizers. The pieces of a job's step (``pieces_of``) are a function of the job alone,
dropout masks and losses included, and are dealt to the processes by their tokens. When a job's pieces are done, one SUM joins

    [undivided gradients | which parameters have one | loss and weight of each piece | tokens of experts | faults]

Then every process divides by the job's weight count and takes the same step. A piece's loss is sent as three numbers of the gradients'
data type, each in a slot that all other processes leave 0, so the job's loss is the same number whoever computed its pieces.

The first process writes; the others follow what it decides between two rounds. At each checkpoint a hash of all adapters is compared.
Messages are JSON in tensors: nothing that another process sends is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from veneer.errors import ConfigError, ProcessError, TrainingError
from veneer.models.devices import resolve_device

T = TypeVar("T")
SLOTS = 3
"""Numbers of fp32 that hold one of fp64 exactly."""
_FIXED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PARENT_SECONDS = 1.0


class Processes:
    """One process among those that train together. With ``size`` 1 every method returns at once.

    Attributes:
        rank, size: number of this process, and of all.
        seconds: time after which a process that does not answer ends the run.
        sequence: number of processes that compute one piece together, each its share of the tokens.
        lockstep: True if the processes need each other within a pass, because they share the base or the tokens. An error in a pass ends
            the run then, since the others wait in the middle of theirs.
    """

    def __init__(self, rank: int = 0, size: int = 1, seconds: float = 0.0) -> None:
        self.rank = rank
        self.size = size
        self.seconds = seconds
        self.sequence = 1
        self.lockstep = False

    @property
    def first(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """True if there is no other process."""
        return self.size == 1

    @property
    def teams(self) -> int:
        """Number of teams; the processes of one compute the same pieces."""
        return self.size // self.sequence

    @property
    def team(self) -> int:
        """Number of this process's team."""
        return self.rank // self.sequence

    @property
    def seat(self) -> int:
        """Number of this process in its team."""
        return self.rank % self.sequence

    def add_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes."""
        if not self.alone:
            self._call(lambda: torch.distributed.all_reduce(tensor))
        return tensor

    def share(self, value: Any = None) -> Any:
        """The first process's value (anything that JSON holds), in every process."""
        if self.alone:
            return value
        data = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(data)])
        self._call(lambda: torch.distributed.broadcast(size, 0))
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.first and data:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._call(lambda: torch.distributed.broadcast(content, 0))
        return json.loads(bytes(content.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """Each process's value (anything that JSON holds), in the order of the processes."""
        if self.alone:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self._numbers(len(data))
        content = torch.zeros(max(sizes), dtype=torch.uint8)
        content[: len(data)] = data
        found = [torch.empty_like(content) for _ in sizes]
        self._call(lambda: torch.distributed.all_gather(found, content))
        return [json.loads(bytes(one[:size].tolist())) for one, size in zip(found, sizes, strict=True)]

    def agree(self, value: object) -> bool:
        """True if all processes have the same value, by the hash of its text."""
        if self.alone:
            return True
        number = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
        return len(set(self._numbers(number))) == 1

    def _numbers(self, number: int) -> list[int]:
        found = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._call(lambda: torch.distributed.all_gather(found, torch.tensor([number])))
        return [int(one) for one in found]

    def common_fault(self, error: Exception | None) -> Exception | None:
        """The same fault in every process: that of the first one that has any."""
        if self.alone:
            return error
        mine = None if error is None else [getattr(error, "code", "training"), str(error) or type(error).__name__]
        faults = self.gather(mine)
        at = next((rank for rank, fault in enumerate(faults) if fault is not None), None)
        if at is None or at == self.rank:
            return error
        code, message = faults[at]
        return TrainingError(f"process {at}: {message}", code)

    def fault_of_pass(self, error: Exception, reason: str = "") -> ProcessError:
        """The error that ends a run in lockstep when a pass raises. ``reason``: what to say of it, in place of its own message."""
        if isinstance(error, ProcessError):
            return ProcessError(str(error))
        if _is_of_exchange(error):
            return self._lost()
        reason = reason or str(error) or type(error).__name__
        return ProcessError(
            f"process {self.rank} of {self.size}: a pass that all processes share failed: {reason.rstrip('.')}; run the same command to "
            "resume from the last checkpoint"
        )

    def together(self, work: Callable[[], T]) -> T:
        """Do the same work in every process; if it fails in one, all end.

        Raises whatever the work raises in this process; otherwise, in the first process, a TrainingError with another one's message, and
        SystemExit in the others.
        """
        error: Exception | None = None
        done: list[T] = []
        try:
            done.append(work())
        except Exception as found:
            error = found
        fault = self.common_fault(error)
        if fault is None:
            return done[0]
        if not self.first:
            raise SystemExit(1) from fault
        raise error or fault

    def in_step(self, work: Callable[[], T]) -> T:
        """Do the same work in every process, in which they need each other; if it fails in one, all end.

        A process that fails cannot tell the others, since they may wait in the middle of the work, so faults go through the store of the
        launch. Usually all find the same one, and the first process says it; else the process says it that has it.
        """
        try:
            return work()
        except Exception as error:
            fault = self._first_fault(error)
            if fault is error:
                raise
            raise fault from error

    def _first_fault(self, error: Exception) -> BaseException:
        """What to raise here for a fault of work in step."""
        try:
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            first = store.add("faults", 1) == 1
            if first:
                store.set("fault", json.dumps([self.rank, getattr(error, "code", "training"), str(error)]))
            if self.first:
                store.set("fault of 0", "")
            rank, code, message = json.loads(store.get("fault"))
            if self.first:
                return error if message == str(error) else TrainingError(f"process {rank}: {message}", code)
            until = time.monotonic() + _PARENT_SECONDS * 3
            while first and time.monotonic() < until and not store.check(["fault of 0"]):
                time.sleep(0.05)
            return SystemExit(1) if not first or store.check(["fault of 0"]) else error
        except RuntimeError:  # the store is in the first process, which has ended
            return SystemExit(1)

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> ProcessError:
        return ProcessError(
            f"process {self.rank} of {self.size}: another process has ended, or did not answer for {self.seconds:.0f} s; run the same "
            "command to resume from the last checkpoint"
        )


ALONE = Processes()


@contextmanager
def join(processes: int, device: str, minutes: float) -> Iterator[Processes]:
    """Join the processes that a launcher has started; alone if none has.

    Args:
        processes: the number of processes that the options ask for.
        device: the option of this name.
        minutes: time after which a process that does not answer ends the run.

    Raises:
        ConfigError: the launcher's variables are incomplete, it started another number than asked for, or the GPUs cannot be shared.
        ProcessError: not all processes came.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if processes not in (1, size):
        raise ConfigError(
            f"processes: {processes} are asked for, and {size} run; use veneer train --processes {processes} in a shell, or torchrun "
            f"--nproc-per-node {processes} -m veneer train"
        )
    if size == 1 or torch.distributed.is_initialized():
        yield ALONE
        return
    missing = [name for name in _FIXED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set; start the processes with torchrun"
        )
    rank = int(os.environ["RANK"])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    try:
        _check_devices(device, on_gpu)
    except ConfigError as error:  # all processes of a machine find it, and one says it
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(error.exit_code) from error
        raise
    if on_gpu:
        torch.cuda.set_device(resolve_device(device))  # where torch puts a divided base, and what NCCL takes as its own
    _end_with_launcher()
    group = Processes(rank, size, 60 * minutes)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    group._call(
        lambda: torch.distributed.init_process_group(
            backend, rank=rank, world_size=size, timeout=timedelta(minutes=minutes)
        )
    )
    try:
        yield group
    finally:
        torch.distributed.destroy_process_group()


def _is_of_exchange(error: Exception) -> bool:
    """True for an error of torch.distributed itself: of its class, or raised in a call of it, as gloo's are, which have no class."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and module.startswith("torch.distributed")
    )


def _check_devices(device: str, on_gpu: bool) -> None:
    """Raise ConfigError if this machine has fewer GPUs than processes, or none that they can exchange tensors on."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_gpu and resolve_device(device).type == "mps":
        raise ConfigError(
            "device: mps is one GPU, which several processes cannot exchange tensors on; use --device cpu"
        )
    if device.startswith("cuda:"):
        raise ConfigError(f"device: all processes would use {device}; give cuda, so that each takes its own")
    if on_gpu and here > torch.cuda.device_count():
        raise ConfigError(
            f"processes: {here} processes need as many CUDA devices, and this machine has {torch.cuda.device_count()}; start "
            f"{torch.cuda.device_count()}, or use --device cpu"
        )


def _end_with_launcher() -> None:
    """End this process soon after the launcher: it would go on by itself, and hold the run's folder."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def deal(tokens: Sequence[int], size: int) -> list[int]:
    """The process of each piece: the largest first, each to the process that has the fewest tokens so far.

    >>> deal([5, 3, 3, 1], 2)
    [0, 1, 1, 0]
    """
    load = [0] * size
    owner = [0] * len(tokens)
    for piece in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        owner[piece] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[piece]] += tokens[piece]
    return owner


def split(value: float) -> list[float]:
    """A number of fp64 as three of fp32 whose sum it is; one that is not finite as itself and zeros."""
    parts: list[float] = []
    for _ in range(SLOTS):
        part = float(torch.tensor(value, dtype=torch.float64).float())
        parts.append(part)
        value = value - part if abs(value) != float("inf") and value == value and abs(part) != float("inf") else 0.0
    return parts


def joined(parts: Sequence[float]) -> float:
    """The inverse of `split`."""
    total = parts[-1]
    for part in reversed(parts[:-1]):
        total += part
    return total
