"""The safetensors reader: what is legal and sane reads as the library reads it; what was damaged is refused or reads the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as library_load
from safetensors.torch import save as library_save
from tests.checkpoints.helpers import make_folder, outputs, peft_folder, stir
from tests.tiny import tiny

import veneer
from veneer import DoRA
from veneer.checkpoints.files import Folder
from veneer.checkpoints.tensors import Header, digest, read_header, read_tensors, to_buffers
from veneer.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def read(path: Path) -> tuple[dict[str, torch.Tensor], Header]:
    with Folder(path.parent) as folder, folder.open(path.name) as (file, size):
        header = read_header(file, size, path.name)
        return read_tensors(file, header, path.name)[0], header


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.builds(
        lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
        st.sampled_from(DTYPES),
        st.lists(st.integers(1, 4), min_size=1, max_size=4),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=5,
)


@given(tensors=TENSORS, metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=3))
def test_our_files_are_the_librarys_files(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any, metadata: Any
) -> None:
    """What we write the library reads, what it writes we read, and both give the same bits."""
    folder = tmp_path_factory.mktemp("x")
    raw = b"".join(bytes(piece) for piece in to_buffers(tensors, metadata))
    theirs = library_load(raw)
    (folder / "theirs").write_bytes(library_save(tensors, metadata))
    (folder / "ours").write_bytes(raw)
    for found, header in (read(folder / "theirs"), read(folder / "ours")):
        assert header.metadata == metadata
        assert found.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8))
    assert b"".join(bytes(piece) for piece in to_buffers(dict(reversed(tensors.items())), metadata)) == raw


def test_the_digest_sees_names_shapes_dtypes_and_bits() -> None:
    """Each of them changes it; the order of the table does not."""
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, -1.0])},
        {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)},
    ]
    assert digest(one) == digest(dict(reversed(one.items())))
    assert len({digest(one), *map(digest, others)}) == 5


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One fault: bits flipped, bytes cut, inserted, removed or repeated, or the length field changed."""
    data = bytearray(raw)
    header = 8 + int.from_bytes(raw[:8], "little")
    kind = rng.randrange(7)
    # Half of the faults hit the header, which is the smaller part.
    at = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randint(1, 16))
    elif kind == 3:
        del data[at : at + rng.randint(1, 16)]
    elif kind == 4:
        data[at : at + 8] = data[:8]
    elif kind == 5:
        data[:8] = rng.choice(
            [rng.getrandbits(64), rng.randrange(2 * header), abs(header - 8 + rng.randint(-9, 9))]
        ).to_bytes(8, "little")
    else:
        data[at] = rng.randrange(256)
    return bytes(data)


def mutations(count: int, source: Path, folder: Path) -> tuple[int, int]:
    """(refused, loaded) over ``count`` mutations of the file in ``source``; what loads must compute what the original computes."""
    raw = (source / WEIGHTS).read_bytes()
    settings = (source / "adapter_config.json").read_bytes()
    base = tiny("llama", num_hidden_layers=1, tie_word_embeddings=False)
    plain = outputs(base)
    bank = veneer.attach(base)
    bank.load(source, name="original")
    with bank.use("original"):
        expected = outputs(base)
    assert not torch.equal(plain, expected)
    rng = random.Random(7)
    refused = loaded = 0
    make_folder(folder, raw, settings)
    for _ in range(count):
        changed = mutate(raw, rng)
        if changed == raw:
            continue
        (folder / WEIGHTS).write_bytes(changed)
        try:
            bank.load(folder, name="changed")
        except CheckpointError:
            refused += 1
            continue
        with bank.use("changed"):
            assert torch.equal(outputs(base), expected)
        bank.remove("changed")
        loaded += 1
    assert torch.equal(outputs(base), plain)
    return refused, loaded


def with_receipt(folder: Path) -> Path:
    bank = veneer.attach(tiny("llama", num_hidden_layers=1, tie_word_embeddings=False))
    adapter = bank.add("a", DoRA(r=2, target_modules=("q_proj", "v_proj")))
    stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    bank.save("a", folder)
    return folder


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_damaged_files_are_refused_or_equal_in_effect(count: int, tmp_path: Path) -> None:
    """Mutations of a file with a receipt: no crash, and none changes what is computed without being refused."""
    refused, loaded = mutations(count, with_receipt(tmp_path / "a"), tmp_path / "b")
    assert refused > 0.9 * count
    assert refused + loaded > 0.95 * count


def test_damaged_files_without_a_receipt_never_crash(tmp_path: Path) -> None:
    """PEFT's files carry no checksum, so other finite numbers load; everything else is our refusal."""
    source = peft_folder(tmp_path / "a", tiny_options={"num_hidden_layers": 1, "tie_word_embeddings": False})
    raw = (source / WEIGHTS).read_bytes()
    settings = (source / "adapter_config.json").read_bytes()
    bank = veneer.attach(tiny("llama", num_hidden_layers=1, tie_word_embeddings=False))
    folder = make_folder(tmp_path / "b", raw, settings)
    rng = random.Random(8)
    refused = 0
    for _ in range(500):
        (folder / WEIGHTS).write_bytes(mutate(raw, rng))
        try:
            bank.load(folder, name="changed")
        except CheckpointError:
            refused += 1
        else:
            assert all(value.isfinite().all() for value in bank.parameters("changed"))
            bank.remove("changed")
    assert refused > 250


def test_damaged_settings_are_refused_or_equal_in_effect(tmp_path: Path) -> None:
    """500 mutations of adapter_config.json: the probes hold the scale, the tensors the rest."""
    source = with_receipt(tmp_path / "a")
    settings = (source / "adapter_config.json").read_bytes()
    base = tiny("llama", num_hidden_layers=1, tie_word_embeddings=False)
    bank = veneer.attach(base)
    bank.load(source, name="original")
    with bank.use("original"):
        expected = outputs(base)
    folder = make_folder(tmp_path / "b", (source / WEIGHTS).read_bytes(), settings)
    rng = random.Random(9)
    loaded = 0
    for _ in range(500):
        (folder / "adapter_config.json").write_bytes(mutate(b"\x00" * 8 + settings, rng)[8:])
        try:
            bank.load(folder, name="changed")
        except CheckpointError:
            continue
        loaded += 1
        with bank.use("changed"):
            assert torch.equal(outputs(base), expected)
        bank.remove("changed")
    assert 25 < loaded < 450
