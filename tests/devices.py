"""A device that does not exist, for tests of code that must run on a GPU, on machines without one.

    with PretendDevice() as device:
        base.model.to(device)                 every tensor says that it is on cuda:0, and is computed on the CPU
        ...
    device.reads                              the places where a value of the device was read back

Tensors stay ordinary CPU tensors, so the results can be compared bit by bit with those of a CPU. Each storage carries the name of its
pretended device. Two modes keep the account: one answers what Python asks of a tensor (``.device``, ``.to``, ``device=``), the other sees
every operation, those of backward too, and raises where tensors of two devices meet, as CUDA would. It also notes everything that would
make the host wait for the device: ``.item()``, ``.tolist()``, ``.cpu()``, ``bool()``, ``nonzero`` and the like.

A fake tensor without values cannot do this: its backward aborts on a machine without the device, and nothing can be compared.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BYTES = 24 << 30
"""Memory of the device."""
CPU = torch.device("cpu")
aten = torch.ops.aten
_READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten._unique2, aten.unique_dim}
_READS |= {aten.masked_select, aten.unique_consecutive}
_COPIES = {aten.copy_, aten._to_copy}
_ASKED = {Tensor.device.__get__, Tensor.is_cpu.__get__, Tensor.is_cuda.__get__, Tensor.get_device}  # type: ignore[attr-defined]
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}


class DeviceMixError(AssertionError):
    """Tensors of two devices met in one operation."""


class PretendDevice:
    """A context in which ``device`` exists. ``reads`` are the lines of code that waited for it, ``moves`` those that sent it tensors."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.device = torch.device(device)
        self.reads: list[str] = []
        self.moves: list[str] = []
        self.used = 1 << 30
        """Bytes of the device that are said to be in use."""
        self._tags: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self._stack = ExitStack()
        self._cuda: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_name": lambda device=None: "a device that does not exist",
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=BYTES),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: None,
            "mem_get_info": lambda device=None: (BYTES - self.used, BYTES),
            "memory_allocated": lambda device=None: self.used,
            "memory_reserved": lambda device=None: self.used,
            "max_memory_allocated": lambda device=None: self.used,
            "max_memory_reserved": lambda device=None: self.used,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
        }

    def __enter__(self) -> PretendDevice:
        for name, answer in self._cuda.items():
            self._stack.enter_context(patch.object(torch.cuda, name, answer))
        # transformers reads weights in threads, in which the modes below are off.
        self._stack.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        # Otherwise the second mode would be off inside torch.autograd.grad, where layers run again.
        self._stack.enter_context(patch.object(torch.autograd, "has_torch_function", lambda tensors: False))
        # Checkpointing compares devices from inside operations, where the second mode is off.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        self._stack.enter_context(patch.dict(checks, default=lambda x: {"shape": x.shape, "dtype": x.dtype}))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Questions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def counting(self) -> Iterator[PretendDevice]:
        """Forget the reads and moves so far."""
        self.reads.clear()
        self.moves.clear()
        yield self

    def of(self, tensor: Tensor) -> torch.device:
        """The device that a tensor is on."""
        if tensor.is_meta:
            return torch.device("meta")
        found = self._tags.get(tensor.untyped_storage()._cdata)
        return CPU if found is None or found[0].expired() else found[1]

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Say that a tensor's storage is on a device."""
        storage = tensor.untyped_storage()
        if device.type != "cuda":
            self._tags.pop(storage._cdata, None)
        else:
            index = device if device.index is not None else torch.device(device.type, 0)
            self._tags[storage._cdata] = (StorageWeakRef(storage), index)
        return tensor


def _here() -> str:
    """The innermost line of the package under test on the stack, or of the test."""
    frames = [frame for frame in traceback.extract_stack() if "/tests/devices.py" not in frame.filename]
    ours = [frame for frame in frames if "/veneer/" in frame.filename] or frames
    return f"{ours[-1].filename.partition('/veneer/')[2] or ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}"


class _Operations(TorchDispatchMode):
    """Sees every operation: checks its tensors' devices, and puts the results where the arguments are."""

    def __init__(self, owner: PretendDevice) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner, kwargs = self._owner, kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        places = [owner.of(value) for value in given]
        packet = function.overloadpacket
        # A number of the CPU may meet any tensor, except as an index.
        wide = {
            place
            for value, place in zip(given, places, strict=True)
            if place.type == "cuda" or value.dim() or packet in (aten.index, aten.index_put_)
        }
        if len(wide) > 1 and packet not in _COPIES:
            raise DeviceMixError(f"{function} takes tensors on {' and '.join(sorted(map(str, wide)))}, in {_here()}")
        target = next((place for place in places if place.type == "cuda"), CPU)
        if target.type != "cpu" and (packet in _READS or _reads_a_mask(packet, args)):
            owner.reads.append(f"{packet.__name__} in {_here()}")
        out = function(*args, **kwargs)
        if packet is aten.copy_ and len(given) > 1 and places[0] != places[1]:
            (owner.moves if places[0].type != "cpu" else owner.reads).append(f"copy_ in {_here()}")
            return out
        if target.type != "cpu":
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    owner.put(value, target)
        return out


def _reads_a_mask(packet: Any, args: tuple[Any, ...]) -> bool:
    """True for operations whose result's size depends on values."""
    if packet is aten.index:
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return packet is aten.repeat_interleave


class _Questions(TorchFunctionMode):
    """Answers what Python asks of a tensor, and takes ``device=`` out of every call."""

    def __init__(self, owner: PretendDevice) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner, kwargs = self._owner, dict(kwargs or {})
        if function in _ASKED:
            place = owner.of(args[0])
            return _answer(function, place)
        if function in _MOVES:
            return self._move(function, args, kwargs)
        if function in (Tensor.tolist, Tensor.numpy) and owner.of(args[0]).type != "cpu":
            if function is Tensor.numpy:
                raise TypeError(f"can't convert a {owner.device} tensor to numpy, in {_here()}")
            owner.reads.append(f"tolist in {_here()}")
        device = kwargs.pop("device", None)
        if device is None or torch.device(device).type == "meta":
            return function(*args, **kwargs) if device is None else function(*args, **kwargs, device=device)
        out = function(*args, **kwargs, device=CPU)
        return owner.put(out, torch.device(device))

    def _move(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        owner, (x, *rest), copy = self._owner, args, False
        here = owner.of(x)
        if function is not Tensor.to:
            there, dtype, layout = (CPU if function is Tensor.cpu else owner.device), None, None
        else:
            other = next((value for value in (*rest, kwargs.get("other")) if isinstance(value, Tensor)), None)
            copy = bool(kwargs.pop("copy", False))
            there, dtype, _, layout = torch._C._nn._parse_to(*rest, **kwargs)
            there = owner.of(other) if other is not None else (there or here)
        if there.type == "cuda" and there.index is None:
            there = owner.device
        options = {"dtype": dtype or x.dtype} | ({} if layout is None else {"memory_format": layout})
        if "meta" in (here.type, there.type):
            return Tensor.to(x, there if there.type == "meta" else CPU, **options)
        if here == there:
            return Tensor.to(x, **options, copy=copy)
        (owner.moves if there.type != "cpu" else owner.reads).append(f"to({there}) in {_here()}")
        return owner.put(Tensor.to(x, **options, copy=True), there)


def _answer(function: Any, place: torch.device) -> Any:
    if function == Tensor.device.__get__:  # type: ignore[attr-defined]
        return place
    if function == Tensor.get_device:
        return -1 if place.type == "cpu" else place.index
    return place.type == ("cpu" if function == Tensor.is_cpu.__get__ else "cuda")  # type: ignore[attr-defined]
