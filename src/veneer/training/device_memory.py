"""The memory that a run's device has: of a CPU the process's resident memory, of a GPU what PyTorch holds there.

    memory = memory_of(device)
    with memory.peak_of() as peak:
        step()
    peak.bytes

Planning, the live line and the message about a pass that did not fit ask this interface and never a device by its name.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from veneer.training import process_memory
from veneer.training.process_memory import PeakMemory


class DeviceMemory:
    """The memory of the device that a base is on, in bytes. This class is that of a CPU: the resident memory of the process.

    name: the device in messages; empty for the machine's own memory.
    """

    name = ""

    def used(self) -> int:
        """Bytes in use now."""
        return process_memory.resident()

    def highest(self) -> int:
        """The peak since the process began."""
        return process_memory.highest()

    def free(self) -> int | None:
        """Bytes that this process may still use; None if nothing reports it."""
        return process_memory.free()

    def peak_of(self) -> AbstractContextManager[PeakMemory]:
        """Measure the peak inside a context."""
        return process_memory.peak_of()

    def give_back(self) -> None:
        """Return freed memory."""
        process_memory.give_back()

    def answers(self) -> bool:
        """False if the device can no longer be used by this process."""
        return True

    def saving(self, start: int, state: int) -> int:
        """The peak while a state of so many bytes is saved, from ``start`` bytes in use: it is copied, and written from the copy."""
        return start + 2 * state


class CudaMemory(DeviceMemory):
    """Memory that PyTorch holds of one CUDA device. Freed blocks that its allocator keeps count as free."""

    def __init__(self, device: torch.device) -> None:
        self.name = str(device)
        self._device = device
        self._before = 0

    def used(self) -> int:
        """Bytes of live tensors."""
        return int(torch.cuda.memory_allocated(self._device))

    def highest(self) -> int:
        """The peak of live tensors since the process began."""
        return max(self._before, int(torch.cuda.max_memory_allocated(self._device)))

    def free(self) -> int:
        """Bytes that the driver has left, plus those that the allocator keeps unused."""
        left, _ = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(left) + max(0, int(kept))

    @contextmanager
    def peak_of(self) -> Iterator[PeakMemory]:
        """Measure the peak of live tensors; the host waits for the device, so that times are right too."""
        found = PeakMemory()
        torch.cuda.synchronize(self._device)
        self._before = self.highest()
        torch.cuda.reset_peak_memory_stats(self._device)
        yield found
        torch.cuda.synchronize(self._device)
        found.bytes = int(torch.cuda.max_memory_allocated(self._device))

    def give_back(self) -> None:
        """Return the allocator's unused blocks to the driver."""
        gc.collect()
        torch.cuda.empty_cache()

    def answers(self) -> bool:
        """False after an error that CUDA does not recover from, such as an illegal access: each later call fails with it too."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def saving(self, start: int, state: int) -> int:
        """The state is copied to the host, which takes nothing here."""
        return start


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of a device. Apple's GPUs share the machine's."""
    return CudaMemory(device) if device.type == "cuda" else DeviceMemory()
