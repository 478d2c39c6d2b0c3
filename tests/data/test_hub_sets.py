"""Data sets of the hub, from the local cache of ``datasets``: names, splits, and one sentence for each that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer

from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.dataset import load_examples
from veneer.data.rows import hub_sets
from veneer.data.rows.hub_sets import hub_set
from veneer.data.rows.readers import RecordReader, splits
from veneer.data.rows.shapes import RowReader
from veneer.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds org/set with 3 rows in train and 1 in validation, as an earlier download leaves it; no network."""
    import huggingface_hub

    cache = tmp_path / "cache"
    for name, count in (("train", 3), ("validation", 1)):
        rows = [f'{{"prompt": "{name} {i}", "completion": "b", "tools": null}}\n' for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    datasets.disable_progress_bars()
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    made = next(cache.glob("json/*/*/*/"))
    folder = cache / "org___set" / "default" / "0.0.0" / made.name
    folder.parent.mkdir(parents=True)
    made.rename(folder)
    for name in files:
        (folder / f"json-{name}.arrow").rename(folder / f"set-{name}.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    hub_sets._load.cache_clear()
    return cache


def test_a_hub_id_is_read_like_a_folder_with_splits(cached: Path) -> None:
    """Rows have the set and their number as place; a split, and a part of one, are named behind a colon."""
    found = splits("org/set")
    assert found == {"train": Path("org/set:train"), "valid": Path("org/set:validation")}
    records = list(RecordReader(found["train"]))
    assert [record.source for record in records] == [f"org/set:train:row {i}" for i in (1, 2, 3)]
    assert records[0].values == {"prompt": "train 0", "completion": "b"}  # type: ignore[union-attr]
    assert len(list(RecordReader("org/set:validation"))) == 1 and len(list(RecordReader("org/set:train[:2]"))) == 2
    assert splits("org/set:train[:2]") == {"train": Path("org/set:train[:2]")}
    assert RowReader(found["valid"]).notices()[0].startswith("org/set:validation: ")
    examples, report = load_examples(list(found.values()), Renderer(tiny_tokenizer(), RenderOptions()))
    assert (len(examples), report.rows) == (4, 4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "org/other",
            "org/other: no such file, and no data set of that name in the local cache; HF_HUB_OFFLINE is set",
        ),
        ("org/set:tst", "org/set:tst: cannot read the data set of the hub: Unknown split"),
        ("org/set/parts", "cannot read the data set of the hub: .*Available configs"),
    ],
)
def test_a_set_that_is_not_there_is_one_sentence(name: str, says: str, cached: Path) -> None:
    """The set is named, and the reason."""
    with pytest.raises(DataError, match=says) as caught:
        list(RecordReader(splits(name)["train"]))
    assert "\n" not in str(caught.value)


def test_the_package_that_is_missing_is_named(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``datasets`` a name that may be one of the hub says how to get it."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"org/set: no such file; .*pip install 'veneer\[datasets\]'"):
        splits("org/set")


@pytest.mark.parametrize("path", ["rows.jsonl", "data/rows.jsonl", "a/b/c/d", "rows", "/a/b", "here/set", "here/b"])
def test_paths_stay_paths(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with the extension of a file, in a folder that is there, or of another depth is not a data set."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_set(Path(path)) is None
