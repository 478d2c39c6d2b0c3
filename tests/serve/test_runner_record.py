"""A base that the kernel decodes is checked at its first start, and not again until something changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny import tiny, tiny_tokenizer

from veneer.kernels import cpp_library
from veneer.models.load import Base, load_base
from veneer.serve.engine.decoding import DecodingRunner
from veneer.serve.engine.request import SamplingParams
from veneer.serve.generation import text_generator
from veneer.training.cpp_kernels import use_cpp_kernels


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Base]:
    """A base on the disk, with the C++ kernels and a cache of its own."""
    before = cpp_library.folder()
    use_cpp_kernels()
    if not cpp_library.supported():
        pytest.skip("the C++ kernels do not decode on this processor")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    tiny("llama", hidden_size=64, head_dim=32, num_hidden_layers=2).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    yield load_base(str(tmp_path / "base"), dtype="float32")
    cpp_library.use(before)


def start(base: Base) -> tuple[str, int]:
    """(an answer, forwards that the start took)."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    handle = base.model.model.register_forward_pre_hook(counted)
    generator = text_generator(base)
    handle.remove()
    assert isinstance(generator.engine.runner, DecodingRunner)
    return generator.write("the sea", None, SamplingParams(max_tokens=12)), count


def test_the_second_start_takes_no_forward(base: Base) -> None:
    """The answer is the same; changed files, and a record that cannot be read or does not fit, bring the checks back."""
    text, checks = start(base)
    assert checks > 5 and start(base) == (text, 0)
    assert base.path is not None
    os.utime(base.path / "model.safetensors", ns=(1, 1))
    assert start(base) == (text, checks)
    for content in (
        "",
        "[]",
        '{"runner": "DecodingRunner"}',
        '{"runner": "DecodingRunner", "first_position": 0, "cache": {}}',
    ):
        for record in (Path(os.environ["VENEER_HOME"]) / "runners").iterdir():
            record.write_text(content)
        assert start(base) == (text, checks)
    assert start(base) == (text, 0)


def test_another_code_checks_again(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record holds for the versions that made it."""
    text, checks = start(base)
    monkeypatch.setattr("torch.__version__", "0.0")
    assert start(base) == (text, checks)
