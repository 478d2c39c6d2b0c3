"""``veneer.train`` from Python: rows in memory, options by name, and what it returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints.architectures import build
from tests.training.made import QUIET, digest, figures, options

import veneer
from veneer.data.rows.memory_rows import rows_in, write_rows
from veneer.data.rows.shapes import RowReader
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
        assert [step for step, _ in job.losses] == [0, 2] and result.best in (job.best, job.adapter)
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
        ({"data": [{"prompt": "x"}]}, r"data\[0\]: .*completion"),
        ({"data": ROWS, "base": 3}, "base is the name of a base model, or a base of veneer.load_base; found int"),
        ({"config": 3}, "train takes options, a mapping of them or a YAML file, found int"),
        ({"config": "rows.jsonl"}, r"give examples as data='rows\.jsonl'"),
        ({"data": ROWS, "rank": 3}, "did you mean r"),
        ({"data": ROWS, "quantize": "nf4"}, "a plain base in memory is given; load it with"),
    ],
)
def test_wrong_calls_are_told_and_leave_nothing(base: Base, tmp_path: Path, call: dict[str, Any], says: str) -> None:
    """One sentence; no folder is left behind."""
    arguments: dict[str, Any] = {"base": base, "out": tmp_path / "new" / "run", "console": QUIET, **SHORT, **call}
    with pytest.raises((ConfigError, DataError), match=says):
        veneer.train(arguments.pop("config", None), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", ["gemma3", "llava", "qwen2_5_vl", "mistral3"])
def test_text_rows_train_the_language_model_of_a_multimodal_base(arch: str, base: Base, tmp_path: Path) -> None:
    """The default targets leave the images' part alone, and the loss falls, also where the model asks for token types."""
    model = build(arch).requires_grad_(False)
    images = Base(model, base.tokenizer, arch, None, torch.float32)
    chosen = {**SHORT, "steps": 3, "learning_rate": 2e-2, "schedule": "constant", "batch_size": 12}
    result = veneer.train(data=ROWS, base=images, out=tmp_path / "run", console=QUIET, **chosen)
    (job,) = result.jobs.values()
    names = list(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    assert names and all("language_model" in name for name in names)
    losses = [line["loss"] for line in figures(tmp_path / "run" / "metrics" / "run.jsonl") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0] and job.steps == 3


NULLS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": None}]},
    {
        "messages": [{"role": "user", "content": "c", "name": "ann"}, {"role": "assistant", "content": "d"}],
        "tools": None,
    },
]


@pytest.mark.parametrize("kind", ["rows", "set", "frame", "arrow frame"])
def test_nulls_of_rows_in_memory_are_no_data(kind: str, tmp_path: Path) -> None:
    """Structs of a data set and missing cells of a frame give the messages that the rows were made with."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    data = {
        "rows": lambda: NULLS,
        "set": lambda: datasets.Dataset.from_list(NULLS),
        "frame": lambda: pandas.DataFrame(NULLS),
        "arrow frame": lambda: datasets.Dataset.from_list(NULLS).to_pandas(),
    }[kind]()
    rows = rows_in(data, "data")
    assert rows is not None
    found = list(RowReader(write_rows(rows, tmp_path, "data")))
    assert [row.messages for row in found] == [
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
        ({"role": "user", "content": "c", "name": "ann"}, {"role": "assistant", "content": "d"}),
    ]
    assert [row.tools for row in found] == [None, None]


def test_the_former_call_still_works(place: Path, base: Base, tmp_path: Path) -> None:
    """A mapping with a base in memory, and options that replace its own."""
    result = veneer.train(options(place, tmp_path / "a"), base=base, console=QUIET, steps=2)
    assert result.jobs["a"].steps == 2
