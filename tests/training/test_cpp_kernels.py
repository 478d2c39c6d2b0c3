"""A run takes the base's elementwise chains in their faster forms and the C++ kernels: bits and base hold."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tests.training.made import QUIET, digest, options
from tests.training.test_run import stop_after

from veneer.kernels import cpp_library as native
from veneer.models.load import Base
from veneer.training import cpp_kernels as faster
from veneer.training import train
from veneer.training.run.console import Console


def test_the_base_takes_faster_forms_for_the_run_only(place: Path, base: Base, tmp_path: Path) -> None:
    """While a run goes on norms, activations and rotary embeddings are exchanged; afterwards no module has anything of its own."""
    seen: list[int] = []

    class Watcher(Console):
        def progress(self, text: str, *, important: bool = False) -> None:
            seen.append(
                sum("forward" in module.__dict__ for name, module in base.model.named_modules() if "norm" in name)
            )

    train(options(place, tmp_path / "a", steps=2), base=base, console=Watcher(quiet=True))
    assert seen == [3, 3]  # two of the layer, one at the end
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_without_a_compiler_the_run_uses_the_plain_forms(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With compile: true the console says why there are no C++ kernels, and the result is that of a run without."""
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    output = io.StringIO()
    train(options(place, tmp_path / "a", name="one", compile=True), base=base, console=Console(output))
    assert "no C++ kernels: there is no C++ compiler; using PyTorch's" in output.getvalue()
    train(options(place, tmp_path / "b", name="one", compile=False), base=base, console=QUIET)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_run_takes_kernels_in_cpp_and_says_which(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_kernels: Path
) -> None:
    """They are in use while it runs, and no longer; its facts name them; without them the next start tells what changed."""
    used: list[Path | None] = []

    class Watcher(Console):
        def progress(self, text: str, *, important: bool = False) -> None:
            used.append(native.folder())

    monkeypatch.setattr(faster, "build_once", lambda name, build: built_kernels)
    chosen = options(place, tmp_path / "a", name="one", steps=4, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(chosen, base=base, console=stop_after(2))
    kernels = json.loads((tmp_path / "a" / "run.json").read_text())["kernels"]
    assert kernels == (f"C++ {built_kernels.name}" if supported(built_kernels) else "python")
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    said = io.StringIO()
    train(chosen, base=base, console=Console(said))
    if kernels != "python":
        assert f"kernels {kernels} -> python" in said.getvalue()
    train(options(place, tmp_path / "b", steps=2), base=base, console=Watcher(quiet=True))
    assert set(used) == {None}
    monkeypatch.delenv("CXX")
    used.clear()
    train(options(place, tmp_path / "c", steps=2), base=base, console=Watcher(quiet=True))
    assert set(used) == {built_kernels if kernels != "python" else None} and native.folder() is None


def supported(folder: Path) -> bool:
    """Whether the kernels are any faster on this processor."""
    native.use(folder)
    found = native.supported()
    native.use(None)
    return found
