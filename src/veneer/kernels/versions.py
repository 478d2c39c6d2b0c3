"""Marks of tensors: keys for caches that must notice when a tensor is replaced or changed in place."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """The number of changes in place; -1 for a tensor made in inference mode, whose changes torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def mark_of(tensor: Tensor) -> tuple[object, ...]:
    """A key that changes when the tensor is replaced, cast, moved or changed in place; valid while the tensor is alive."""
    return (tensor.dtype, tensor.device, tensor.data_ptr(), version_of(tensor))
