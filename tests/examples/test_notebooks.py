"""The notebooks in ``examples/`` run from the first to the last cell, on a tiny base and in few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.project.source import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}


def cells(name: str) -> list[dict[str, Any]]:
    """The cells of a notebook."""
    return json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]  # type: ignore[no-any-return]


@pytest.fixture
def names(request: pytest.FixtureRequest, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a notebook has defined after its last cell."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for cell in cells(request.param):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), request.param, "exec"), found)
            if "STEPS" in found and found["STEPS"] != 4:
                found |= {"MODEL": base, "STEPS": 4}
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", ["first_adapter"], indirect=True)
def test_first_adapter(names: dict[str, Any], tmp_path: Path) -> None:
    """The run is finished, and the base and the adapter have each answered."""
    assert (tmp_path / "runs" / "pirate" / "adapter" / "adapter_config.json").is_file()
    assert set(names["answers"]) == {"base", "pirate"} and names["result"].jobs["pirate"].steps == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", ["many_adapters"], indirect=True)
def test_many_adapters(names: dict[str, Any]) -> None:
    """Four routes have answered in one batch, and each row equals the row alone."""
    assert names["bank"].names == ["pirate", "formal"] and len(names["answers"]) == 4
    assert max(names["differences"]) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", ["compare_inspect"], indirect=True)
def test_compare_inspect(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Both ranks have held-out losses, and the shares of the singular values of each layer add up to 1."""
    assert {job.r for job in names["result"].jobs.values()} == {2, 8}
    assert all([step for step, _ in losses] == [0, 2, 4] for losses in names["losses"].values())
    assert names["shares"] and all(sum(shares) == pytest.approx(1, abs=0.01) for shares in names["shares"].values())


def test_every_notebook_is_tested_and_clean() -> None:
    """Each notebook has a test above, and is stored without outputs."""
    tested = Path(__file__).read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    for name in NOTEBOOKS:
        assert f'["{name}"]' in tested
        code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
        assert len(code) >= 4 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
