"""A run takes the base's elementwise chains in their faster forms, and compiles them where it was decided to: bits and base hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_elementwise import can_compile
from tests.training.made import QUIET, digest, options
from tests.training.test_run import stop_after

from veneer.errors import ConfigError
from veneer.kernels import cpp_library as native
from veneer.kernels.elementwise import compiled
from veneer.kernels.elementwise.compiled import status
from veneer.models.load import Base
from veneer.training import acceleration as faster
from veneer.training import train
from veneer.training.acceleration import worth_compiling
from veneer.training.run.console import Console

CPU = torch.device("cpu")


def test_auto_compiles_what_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that the plan says is long compiles, a short one and one without a plan do not; what is asked for is done."""
    monkeypatch.setattr(faster, "_has_compiler", lambda device: True)
    assert [worth_compiling("auto", seconds, CPU) for seconds in (None, 10.0, 1e4)] == [False, False, True]
    assert worth_compiling(True, None, CPU) and not worth_compiling(False, 1e4, CPU)
    monkeypatch.setattr(faster, "_has_compiler", lambda device: False)
    assert not worth_compiling("auto", 1e4, CPU)


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
    assert not status().on


@pytest.mark.timeout(300)
def test_a_compiled_run_goes_on_to_the_same_bits(place: Path, base: Base, tmp_path: Path) -> None:
    """It compiles after its first round, says so, keeps to it when it goes on, and ends as the run that was never stopped."""
    if reason := can_compile():
        pytest.skip(reason)
    chosen = {"name": "one", "steps": 4, "save_every": 1, "compile": True}
    said = io.StringIO()
    train(options(place, tmp_path / "never", **chosen), base=base, console=Console(said))
    assert "compiled the base's elementwise chains into" in said.getvalue() and not status().on
    assert json.loads((tmp_path / "never" / "run.json").read_text())["compile"] is True
    for at in (1, 2):
        stopped = options(place, tmp_path / f"stopped{at}", **chosen)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, base=base, console=stop_after(at))
        train(stopped, base=base, console=QUIET)
        assert digest(tmp_path / f"stopped{at}") == digest(tmp_path / "never")
    with pytest.raises(ConfigError, match="compile: True there, False now"):
        train(options(place, tmp_path / "never", **{**chosen, "compile": False}), base=base, console=QUIET)


def test_where_compiling_fails_the_run_goes_on(
    place: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain functions take over, the screen says why, and the result is that of a run without."""

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setenv("CXX", "no-such-compiler-here")  # no kernels in C++ either
    monkeypatch.setattr(compiled.torch, "compile", broken)
    for chain in compiled._chains:
        monkeypatch.setattr(chain, "_made", {})
    said = io.StringIO()
    train(options(place, tmp_path / "a", name="one", compile=True), base=base, console=Console(said))
    assert "nothing is compiled: compiling" in said.getvalue() and "no compiler here" in said.getvalue()
    assert "no C++ kernels: there is no C++ compiler; using PyTorch's" in said.getvalue()
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
    assert kernels == (f"C++ {built_kernels.name}" if pays(built_kernels) else "python")
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


def pays(folder: Path) -> bool:
    """Whether the kernels are any faster on this processor."""
    native.use(folder)
    found = native.pays()
    native.use(None)
    return found
