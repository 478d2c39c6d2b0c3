"""Nothing that lies in a folder is run: pickles under any name, code beside a model, templates that reach for Python."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints.helpers import make_folder
from tests.tiny import tiny, tiny_tokenizer

import veneer
from veneer.cli.main import main
from veneer.errors import BaseModelError, CheckpointError, DataError
from veneer.models.load import load_base

SYSTEM = os.system  # as it is before a test takes it away


class Canary:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return SYSTEM, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that must never appear; starting another program is an error."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a program was started")

    for owner, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (os, "fork")):
        monkeypatch.setattr(owner, name, refuse)
    return tmp_path / "canary"


def test_the_canary_sings(tmp_path: Path) -> None:
    """Unpickled, it does make the file; so its absence says something."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def as_bin(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(data)


def beside(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_model.bin").write_bytes(data)


def renamed(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)


def zipped(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "adapter_model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", data)


def behind_a_header(folder: Path, data: bytes) -> None:
    """A legal safetensors file with a zip archive at its end, which zip readers find from behind."""
    path = folder / "adapter_model.safetensors"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", data)


def as_settings(folder: Path, data: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(data)


DISGUISES: list[Callable[[Path, bytes], None]] = [as_bin, beside, renamed, zipped, behind_a_header, as_settings]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("disguise", DISGUISES, ids=lambda disguise: disguise.__name__)
def test_a_pickle_is_never_opened(disguise: Callable[[Path, bytes], None], protocol: int, canary: Path) -> None:
    """In every place and under every name it is refused, and what it would have run did not run."""
    folder = make_folder(canary.parent / "hostile")
    disguise(folder, pickle.dumps(Canary(canary), protocol))
    bank = veneer.attach(tiny("llama"))
    with pytest.raises(CheckpointError):
        bank.load(folder)
    assert main(["inspect", str(folder)]) == 1
    assert not canary.exists() and bank.names == []


def base_folder(folder: Path) -> Path:
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_base_of_pickles_is_not_opened(name: str, canary: Path) -> None:
    """Weights that are pickles, or an index that points outside the folder, are refused."""
    folder = base_folder(canary.parent / "base")
    (folder / "model.safetensors").unlink()
    (canary.parent / "outside.bin").write_bytes(pickle.dumps(Canary(canary)))
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps({"weight_map": {"model.norm.weight": "../outside.bin"}}))
    else:
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(BaseModelError):
        load_base(folder)
    assert not canary.exists()


def test_code_beside_a_model_is_not_imported(canary: Path) -> None:
    """auto_map and trust_remote_code in a config bring no file of the folder to run: refused, or the named class is used."""
    folder = base_folder(canary.parent / "base")
    (folder / "modeling_own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
        trust_remote_code=True,
    )
    change(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_own.T", None]}, trust_remote_code=True
    )
    with contextlib.suppress(BaseModelError):
        load_base(folder)
    assert not canary.exists()


REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ 'a' * 10 ** 12 }}",
]


@pytest.mark.parametrize("template", REACHING)
def test_a_template_reaches_nothing(template: str, canary: Path) -> None:
    """Rows of a template that reaches for Python, files or all memory are refused one by one, with the template's own words."""
    from veneer.data.chat.render import Renderer, RenderOptions
    from veneer.data.rows.row import Row

    source = template.replace("CANARY", str(canary)) + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    renderer = Renderer(tiny_tokenizer(), RenderOptions(chat_template=source))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        renderer.render(Row.chat("rows.jsonl:1", turns))
    assert not canary.exists()
