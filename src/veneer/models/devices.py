"""Devices: the one that a base runs on, and how tensors get there.

    resolve_device("auto")      a CUDA device if there is one, Apple's GPU on a Mac, else the CPU
    together(device, ids, ...)  several small tensors in one copy

``device_problem`` says in one sentence why a device cannot be used, before anything is loaded. In a run of several processes "auto" and
"cuda" mean the device of the process (``LOCAL_RANK``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.errors import ConfigError

_NAME = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?")
_ALIGN = 16
"""Bytes to which each tensor of a joint copy is aligned, so that every data type can view its part."""


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device that a name means on this machine.

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps", or a device.

    Raises:
        ConfigError: no device has this name, or this machine does not have it.
    """
    if isinstance(name, torch.device):
        return name
    problem = device_problem(name)
    if problem is not None:
        raise ConfigError(f"device: {problem}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    if name == "cuda":
        return torch.device("cuda", _local_rank() % max(1, torch.cuda.device_count()))
    return torch.device(name)


def device_problem(name: str) -> str | None:
    """The reason why a device cannot be used here, with the remedy; None if it can."""
    if not _NAME.fullmatch(name):
        return f"expected auto, cpu, cuda, cuda:N or mps, found {name!r}"
    if name.startswith("cuda"):
        return _cuda_problem(name)
    if name == "mps" and not _has_mps():
        return "mps is Apple's GPU, and PyTorch finds none on this machine; use auto or cpu"
    return None


def _cuda_problem(name: str) -> str | None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        cause = (
            f"PyTorch {torch.__version__} is built without CUDA; install a build with CUDA"
            if not torch.backends.cuda.is_built()
            else "PyTorch finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
        return f"{name} cannot be used: {cause}, or use cpu"
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"{name} does not exist: this machine has {known}; choose one of them, or auto"
    return None


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _local_rank() -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    return int(rank) if rank.isdigit() else 0


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of a model's weights; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def device_name(device: torch.device) -> str:
    """The kind of a device, with a GPU's model: the numbers of a run may differ in their last bits on another."""
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its work. Before a clock is read: a GPU works on after the calls have returned."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


def together(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """The tensors on ``device``, by one copy of all their bytes; those that are there already are returned as they are.

    Small tensors cost a call of the driver each; a batch has five.
    """
    left = [t for t in tensors if t.device != device]
    if len(left) < 2 or device.type == "mps" or any(t.device.type != "cpu" for t in left):
        return [t.to(device) for t in tensors]
    moved = iter(_one_copy(device, left))
    return [t if t.device == device else next(moved) for t in tensors]


def _one_copy(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    sizes = [t.numel() * t.element_size() for t in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGN) * _ALIGN)
    host = torch.empty(starts[-1], dtype=torch.uint8)
    for t, start, size in zip(tensors, starts, sizes, strict=False):
        host[start : start + size].view(t.dtype).copy_(t.reshape(-1))
    there = host.to(device)
    pieces = zip(tensors, starts, sizes, strict=False)
    return [there[start : start + size].view(t.dtype).view(t.shape) for t, start, size in pieces]
