"""``veneer.train`` from Python: rows in memory, options by name, and what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training.made import QUIET, digest, options

import veneer
from veneer.errors import ConfigError, DataError, VeneerError
from veneer.models.load import Base

ROWS = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(4) for b in range(3)]
SHORT: dict[str, Any] = {"r": 2, "steps": 2, "batch_size": 2, "warmup_steps": 0, "dtype": "float32", "plan": False}


def test_rows_in_memory_train_as_their_file_does(place: Path, base: Base, tmp_path: Path) -> None:
    """A list of mappings ends with the bits of the same rows in a file; the call resumes, and other rows are refused."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared: dict[str, Any] = {**SHORT, "base": base, "console": QUIET, "name": "x"}
    veneer.train(data=file, out=tmp_path / "file", **shared)
    result = veneer.train(data=ROWS, out=tmp_path / "rows", **shared)
    assert digest(tmp_path / "file") == digest(tmp_path / "rows")
    assert veneer.train(data=iter(ROWS), out=tmp_path / "rows", **shared) == result
    more = veneer.train(data=ROWS, out=tmp_path / "rows", **{**shared, "steps": 3})
    assert more.jobs["x"].steps == 3
    with pytest.raises(VeneerError, match="the examples of x changed"):
        veneer.train(data=ROWS[:-1], out=tmp_path / "rows", **{**shared, "steps": 3})
    config = json.loads((tmp_path / "rows" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name


def test_data_sets_and_frames(base: Base, tmp_path: Path) -> None:
    """A data set, a frame and held-out rows; the result is a path to what it made."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    for name, data in {"set": datasets.Dataset.from_list(ROWS), "frame": pandas.DataFrame(ROWS)}.items():
        result = veneer.train(data=data, valid=ROWS[:3], base=base, out=tmp_path / name, console=QUIET, **SHORT)
        (job,) = result.jobs.values()
        assert len(job.losses) == 3 and result.best in (job.best, job.adapter)
        assert repr(result).endswith(f"{name}: finished after 2 steps)")
        assert f"<td>{name}</td><td>finished</td><td>2</td>" in result._repr_html_()
        bank = veneer.attach(base.model)
        try:
            assert bank.load(result).name == name
        finally:
            bank.detach()
    same = [next((tmp_path / name / "data").glob("data-*")).read_bytes() for name in ("set", "frame")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"data": [1]}, r"data\[0\]: expected a row such as .*, found int"),
        ({"data": [ROWS[0], "x"]}, r"data\[1\]: expected a row .*, found str"),
        ({"data": {"train": ROWS}}, "found a mapping with train; give one of its values"),
        ({"data": 3}, "found int"),
        ({"data": [{"prompt": {1}, "completion": "x"}]}, r"data\[0\]: the row cannot be written as JSON"),
        ({"data": [{"prompt": "x"}]}, "completion"),
        ({"data": ROWS, "base": 3}, "base is the name of a base model, or a base of veneer.load_base; found int"),
        ({"config": 3}, "train takes options, a mapping of them or a YAML file, found int"),
        ({"config": "rows.jsonl"}, r"give examples as data='rows\.jsonl'"),
        ({"data": ROWS, "rank": 3}, "did you mean r"),
    ],
)
def test_wrong_calls_are_told_and_leave_nothing(base: Base, tmp_path: Path, call: dict[str, Any], says: str) -> None:
    """One sentence; no folder is left behind."""
    arguments: dict[str, Any] = {"base": base, "out": tmp_path / "new" / "run", "console": QUIET, **SHORT, **call}
    with pytest.raises((ConfigError, DataError), match=says):
        veneer.train(arguments.pop("config", None), **arguments)
    assert not list(tmp_path.iterdir())


def test_the_former_call_still_works(place: Path, base: Base, tmp_path: Path) -> None:
    """A mapping with a base in memory, and options that replace its own."""
    result = veneer.train(options(place, tmp_path / "a"), base=base, console=QUIET, steps=2)
    assert result.jobs["a"].steps == 2
