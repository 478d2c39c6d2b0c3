"""The files that one call of an adapted layer enters: few enough to be read in one sitting."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.project.source import PACKAGE
from torch import Tensor, nn

from veneer.adapters import LoRA, attach
from veneer.kernels import cpp_library as native


class TracedLayer(nn.Module):
    """A model of one linear layer whose call can be traced, its model's own bookkeeping excluded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 96, dtype=dtype)
        self.around: Callable[[Callable[[], Tensor]], Tensor] = lambda call: call()

    def forward(self, x: Tensor) -> Tensor:
        return self.around(lambda: self.layer(x))


def entered(call: Callable[[], Any], files: set[Path]) -> Any:
    """Run ``call`` and add the files of the package that it enters."""

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.add(path)

    sys.setprofile(trace)
    try:
        return call()
    finally:
        sys.setprofile(None)


def files_of_a_step(*, fast: bool, dtype: torch.dtype) -> set[Path]:
    """Files that the second training step enters in the layer's forward and, on the fast path, in its backward."""
    model = TracedLayer(dtype)
    bank = attach(model)
    bank.add("a", LoRA(r=4, target_modules=("layer",)))
    bank.fast_path = fast
    x = torch.randn(8, 64).to(dtype).requires_grad_()
    files: set[Path] = set()
    with bank.use("a"):
        model(x).sum().backward()
        model.around = lambda call: entered(call, files)
        y = model(x)
    # Autograd runs a CPU backward in the thread that asks for it.
    entered(y.sum().backward, files)
    return files


def lines(files: set[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def test_the_plain_path_is_short() -> None:
    """At most 6 files and 900 lines."""
    files = files_of_a_step(fast=False, dtype=torch.float32)
    assert {"forward.py", "plain_path.py", "reference.py"} <= {path.name for path in files}
    assert len(files) <= 6 and lines(files) <= 900, (lines(files), sorted(path.name for path in files))


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_is_short(dtype: torch.dtype) -> None:
    """At most 14 files and 3,500 lines, down to C++ and back."""
    files = files_of_a_step(fast=True, dtype=dtype)
    assert {"fast_path.py", "native.py"} <= {path.name for path in files} and native.library() is not None
    sources = PACKAGE / "kernels" / "cpp"
    files |= {*sources.glob("low_rank*"), sources / "products.h", sources / "vec.h"}
    assert len(files) <= 14 and lines(files) <= 3500, (lines(files), sorted(path.name for path in files))
