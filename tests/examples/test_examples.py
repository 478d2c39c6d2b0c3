"""Every script in ``examples/`` runs, on a tiny base, and does what it says."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.project.source import ROOT

EXAMPLES = ROOT / "examples"


def entry(name: str) -> Callable[..., Any]:
    """The ``main`` function of an example."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]  # type: ignore[no-any-return]


def test_own_loop() -> None:
    """The adapter learns in the user's loop."""
    assert entry("own_loop")(steps=120) < 0.1


def test_mixed_batch(base: str) -> None:
    """Each row of a mixed batch equals the row alone."""
    assert entry("mixed_batch")(base) < 1e-4


def test_many_jobs_and_compose(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three jobs train in one run; two of their adapters are composed and inspected."""
    losses = entry("many_jobs")(base, str(tmp_path / "jobs"), 8)
    assert set(losses) == {"sums", "upper", "upper-dora"} and all(after < before for before, after in losses.values())
    adapters = tmp_path / "jobs" / "adapters"
    entry("compose_inspect")(str(adapters / "sums"), str(adapters / "upper"), str(tmp_path / "both"))
    assert (tmp_path / "both" / "adapter_config.json").is_file() and "stable rank" in capsys.readouterr().out


def test_flat_loop(base: str) -> None:
    """Both jobs of the hand-written loop learn."""
    assert all(values[-1] < values[0] for values in entry("flat_loop")(base, 6).values())


def test_trainer(base: str, tmp_path: Path) -> None:
    """transformers' Trainer trains the adapter, which is saved."""
    assert entry("trainer")(base, str(tmp_path / "trainer"), 2) > 0
    assert (tmp_path / "trainer" / "adapter" / "adapter_model.safetensors").is_file()


def test_preferences(base: str, tmp_path: Path) -> None:
    """The adapter prefers the short answers more often than the base, which has no preference."""
    before, after = entry("preferences")(base, str(tmp_path / "preferences"), 30)
    assert before == 0.5 and after > 0.7


def test_every_example_is_tested() -> None:
    """Each script has a test above."""
    tested = Path(__file__).read_text(encoding="utf-8")
    scripts = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(scripts) >= 6
    assert [name for name in scripts if f'entry("{name}")' not in tested] == []
