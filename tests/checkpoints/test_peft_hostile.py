"""Hostile and broken folders: each is refused in milliseconds, says why, and leaves the base as it was."""

from __future__ import annotations

import hashlib
import json
import math
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import config, file_bytes, make_folder, outputs, q_tensors, tensor_bytes
from tests.tiny import tiny
from torch import Tensor

import veneer
from veneer.errors import CheckpointError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
BOMB = "(([a-z0-9_.])+)+!"
Case = tuple[str, Any, Any, str]


def with_entry(**changes: Any) -> bytes:
    """The default file with one field of one tensor's header entry changed."""
    raw = tensor_bytes(q_tensors())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[f"{Q0}.lora_A.weight"].update(changes)
    return file_bytes(header, raw[8 + length :])


def with_name(name: str) -> dict[str, Tensor]:
    return {**q_tensors(), name: torch.zeros(2, 2)}


def with_value(name: str, value: float) -> dict[str, Tensor]:
    tensors = q_tensors()
    tensors[f"{Q0}.{name}"][0, 0] = value
    return tensors


def with_dtype(dtype: torch.dtype, name: str | None = None) -> bytes:
    tensors = {key: value.to(dtype) for key, value in q_tensors().items()}
    return tensor_bytes(tensors, dict.fromkeys(tensors, name) if name else None)


def twice() -> bytes:
    """Two tensors of one name."""
    raw = tensor_bytes(q_tensors())
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    first = header[1 : header.index(b"}") + 1]
    return file_bytes(b"{" + first + b"," + header[1:], data)


def dora(values: float | None = None) -> dict[str, Tensor]:
    sizes = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": torch.ones(32) for i in range(2)
    }
    if values is not None:
        sizes[f"{Q0}.lora_magnitude_vector"][3] = values
    return {**q_tensors(), **sizes}


def many(count: int) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return file_bytes({str(i): empty for i in range(count)})


CASES: list[Case] = [
    # name, tensors or raw bytes, settings or raw bytes, what the message must say
    (
        "extra norm",
        with_name("base_model.model.model.norm.weight"),
        None,
        "model.norm.weight is not part of a LoRA or DoRA adapter",
    ),
    (
        "extra head",
        {**q_tensors(), "base_model.model.lm_head.weight": torch.zeros(320, 32)},
        None,
        "lm_head.weight differs from the base's",
    ),
    (
        "extra head of another size",
        {**q_tensors(), "base_model.model.lm_head.weight": torch.zeros(330, 32)},
        None,
        "resize_token_embeddings",
    ),
    ("base layer's weight", with_name(f"{Q0}.base_layer.weight"), None, "base_layer.weight is not part of"),
    ("base layer's bias", with_name(f"{Q0}.base_layer.bias"), None, "base_layer.bias is not part of"),
    ("buffer", with_name("base_model.model.model.rotary_emb.inv_freq"), None, "inv_freq is not part of"),
    ("pissa", None, config(init_lora_weights="pissa"), "takes a part of the base into the adapter"),
    ("pissa_niter", None, config(init_lora_weights="pissa_niter_64"), "path_initial_model_for_weight_conversion"),
    ("olora", None, config(init_lora_weights="olora"), "takes a part of the base"),
    ("corda", None, config(init_lora_weights="corda"), "takes a part of the base"),
    ("loftq", None, config(init_lora_weights="loftq"), "takes a part of the base"),
    ("unknown initialiser", None, config(init_lora_weights="abc"), "abc is not known"),
    ("regex in alpha_pattern", None, config(alpha_pattern={BOMB: 3}), "needs a regular expression"),
    ("rank in the settings", None, config(r=2_000_000), "r: Input should be less than or equal to 4096"),
    ("rank 65536", None, config(r=65536), "less than or equal to 4096"),
    ("rank 0", None, config(r=0), "greater than or equal to 1"),
    ("rank -1", None, config(r=-1), "greater than or equal to 1"),
    ("rank as text", None, config(r="8"), "valid integer"),
    ("rank 1.5", None, config(r=1.5), "valid integer"),
    ("rank true", None, config(r=True), "valid integer"),
    ("rank that disagrees", None, config(r=8), "declares rank 8"),
    ("rank by pattern that disagrees", None, config(rank_pattern={"0.self_attn.q_proj": 9}), "declares rank 9"),
    (
        "rank in the tensors",
        {f"{Q0}.lora_A.weight": torch.zeros(5000, 32), f"{Q0}.lora_B.weight": torch.zeros(32, 5000)},
        None,
        "rank 5,000",
    ),
    ("alpha 1e308", None, config(lora_alpha=1e308), "lora_alpha"),
    ("alpha 0", None, config(lora_alpha=0), "greater than 0"),
    ("alpha -1", None, config(lora_alpha=-1), "greater than 0"),
    (
        "alpha NaN",
        None,
        b'{"peft_type":"LORA","r":4,"lora_alpha":NaN,"target_modules":["q_proj"]}',
        "NaN is not a number that JSON has",
    ),
    ("alpha as text", None, config(lora_alpha="8"), "lora_alpha"),
    ("alpha out of proportion", None, config(lora_alpha=500_000), 'force="scale"'),
    ("alpha by pattern", None, config(alpha_pattern={"q_proj": 1e300}), "alpha_pattern"),
    ("NaN", with_value("lora_A.weight", math.nan), None, "lora_A: 1 of 128 numbers are not finite"),
    ("infinity", with_value("lora_B.weight", math.inf), None, "lora_B: 1 of 128 numbers are not finite"),
    ("huge", with_value("lora_B.weight", 1e38), None, "norm of up to"),
    ("int64", with_dtype(torch.int64), None, "expected dtype F32, F16, BF16, found I64"),
    ("float64", with_dtype(torch.float64), None, "found F64"),
    ("float8", with_dtype(torch.int8, "F8_E4M3"), None, "found F8_E4M3"),
    ("complex", with_dtype(torch.int64, "C64"), None, "found C64"),
    ("dtype as a list", with_entry(dtype=["F32"]), None, "expected dtype"),
    (
        "missing tensor",
        {k: v for k, v in q_tensors().items() if "layers.1" not in k or "lora_A" in k},
        None,
        "lora_B is missing beside lora_A",
    ),
    (
        "missing layer",
        q_tensors(layers=1),
        None,
        "names model.layers.1.self_attn.q_proj, which the file has no tensors for",
    ),
    (
        "layer that is not declared",
        None,
        config(target_modules=["v_proj"]),
        "does not name model.layers.0.self_attn.q_proj",
    ),
    (
        "layer that is not there",
        q_tensors(layers=3),
        None,
        "model.layers.2.self_attn.q_proj: the base has no such layer",
    ),
    (
        "wrong shape",
        {**q_tensors(), f"{Q0}.lora_A.weight": torch.zeros(4, 31)},
        None,
        "expected shape (4, 32), found (4, 31)",
    ),
    (
        "ranks of a pair differ",
        {**q_tensors(), f"{Q0}.lora_B.weight": torch.zeros(32, 5)},
        None,
        "expected shape (32, 4), found (32, 5)",
    ),
    ("transposed", {**q_tensors(), f"{Q0}.lora_A.weight": torch.zeros(32, 4)}, None, "lora_A.weight: expected shape"),
    (
        "three dimensions",
        {**q_tensors(), f"{Q0}.lora_A.weight": torch.zeros(4, 32, 1)},
        None,
        "expected shape (4, 32), found (4, 32, 1)",
    ),
    ("two adapters", {**q_tensors(), f"{Q0}.lora_A.x.weight": torch.zeros(4, 32)}, None, "are the same tensor"),
    (
        "two adapters by name",
        {k.replace(".weight", f".{k.count('A')}.weight"): v for k, v in q_tensors().items()},
        None,
        "holds 2 adapters",
    ),
    ("magnitude without use_dora", dora(), None, "use_dora is false"),
    ("use_dora without magnitude", None, config(use_dora=True), "lora_magnitude_vector is missing"),
    ("magnitude NaN", dora(math.nan), config(use_dora=True), "lora_magnitude_vector: 1 of 32 numbers are not finite"),
    ("path in a name", with_name("../../etc/x"), None, "is not part of a LoRA or DoRA adapter"),
    ("path in a layer", with_name("base_model.model.../../x.lora_A.weight"), None, "is not part of"),
    ("NUL in a name", with_name("base_model.model.a\x00b.lora_A.weight"), None, "a\\x00b: the base has no such layer"),
    (
        "bidirectional name",
        with_name("base_model.model.a\u202eb.lora_A.weight"),
        None,
        "a\\u202eb: the base has no such layer",
    ),
    (
        "dunder name",
        with_name("base_model.model.__class__.lora_A.weight"),
        None,
        "__class__: the base has no such layer",
    ),
    ("long name", with_name("base_model.model." + "a." * 20_000 + "lora_A.weight"), None, "is not part of"),
    (
        "diffusion name",
        with_name("lora_unet_down_blocks_0.lora_down.weight"),
        None,
        "is named as diffusion tools do it",
    ),
    ("unknown key", None, config(twist=2), "adapter_config.json, twist: not known"),
    ("activated LoRA", None, config(alora_invocation_tokens=[1]), "alora_invocation_tokens: not supported"),
    ("layer replication", None, config(layer_replication=[[0, 2]]), "layer_replication: not supported"),
    ("QA-LoRA", None, config(use_qalora=True), "use_qalora: not supported"),
    ("block diagonal", None, config(use_bdlora={"nblocks": 2}), "use_bdlora: not supported"),
    ("Arrow", None, config(arrow_config={"top_k": 3}), "arrow_config: not supported"),
    ("KaSA", None, config(kasa_config={"beta": 1}), "kasa_config: not supported"),
    ("VeLoRA", None, config(velora_config={"x": 1}), "velora_config: not supported"),
    ("MonteCLoRA", None, config(monteclora_config={"x": 1}), "monteclora_config: not supported"),
    ("Megatron", None, config(megatron_config={"x": 1}), "megatron_config: not supported"),
    ("another method", None, config(peft_type="ADALORA"), 'expected "LORA"'),
    ("no method", None, {"r": 4}, 'expected "LORA"'),
    ("settings are a list", None, b"[]", "expected a table of settings"),
    ("settings are not JSON", None, b"{", "is not usable JSON"),
    ("settings are not UTF-8", None, b"\xff\xfe{}", "byte 0 is not UTF-8"),
    ("settings are empty", None, b"", "is not usable JSON"),
    ("settings nest deeply", None, b'{"a":' * 100_000, "is nested too deeply"),
    ("settings have a name twice", None, b'{"peft_type":"LORA","r":4,"r":8}', '"r" occurs twice'),
    ("settings are huge", None, b" " * (3 << 20), "at most 2,097,152 are read"),
    ("settings have a huge number", None, b'{"peft_type":"LORA","r":' + b"9" * 100_000 + b"}", "is not usable JSON"),
    ("empty file", b"", None, "it has 0 bytes"),
    ("short file", b"\x05\x00", None, "it has 2 bytes"),
    ("length of 100 MB", file_bytes(b"{}", length=100 << 20), None, "claims 104,857,600 bytes"),
    ("length of 2^63", file_bytes(b"{}", length=1 << 63), None, "at most 4,194,304 are read"),
    ("length beyond the file", file_bytes(b"{}", length=1000), None, "is cut off"),
    ("header is a list", file_bytes(b"[]"), None, "does not begin with a brace"),
    ("header is not JSON", file_bytes(b"{]"), None, "is not usable JSON"),
    ("header nests deeply", file_bytes(b'{"a":' * 50_000), None, "nested too deeply"),
    ("header is empty", file_bytes({}), None, "the file holds no tensor"),
    ("thirty thousand tensors", many(30_000), None, "names more than 20,000 tensors"),
    (
        "numbers without end",
        file_bytes(b'{"a":[' + b"1," * 1_500_000 + b"1]}"),
        None,
        "its header is too complex",
    ),
    ("metadata of numbers", file_bytes({"__metadata__": {"a": 1}}), None, "metadata is not a table of texts"),
    ("name twice", twice(), None, "occurs twice"),
    ("no shape", with_entry(shape=None), None, "expected 1 to 4 sizes"),
    ("no sizes", with_entry(shape=[]), None, "expected 1 to 4 sizes"),
    ("100,000 dimensions", with_entry(shape=[1] * 100_000), None, "expected 1 to 4 sizes of at least 1"),
    ("size 0", with_entry(shape=[0, 2**62]), None, "expected 1 to 4 sizes of at least 1"),
    ("size 2^63", with_entry(shape=[2**63]), None, "expected 1 to 4 sizes"),
    ("size -1", with_entry(shape=[-1, 32]), None, "expected 1 to 4 sizes"),
    ("size 1.5", with_entry(shape=[1.5, 32]), None, "expected 1 to 4 sizes"),
    ("size true", with_entry(shape=[True, 128]), None, "expected 1 to 4 sizes"),
    ("offsets backwards", with_entry(data_offsets=[512, 0]), None, "does not fill the bytes"),
    ("offsets overlap", with_entry(data_offsets=[4, 516]), None, "a hole before it"),
    ("offsets beyond the file", with_entry(data_offsets=[1 << 40, (1 << 40) + 512]), None, "the data"),
    ("offsets of texts", with_entry(data_offsets=["0", "512"]), None, "expected two offsets"),
    ("unknown field", with_entry(strides=[1]), None, "expected dtype, shape and data_offsets"),
    ("bytes at the end", tensor_bytes(q_tensors()) + b"x", None, "the file has 2,049"),
    ("cut at the end", tensor_bytes(q_tensors())[:-1], None, "the file has 2,047"),
    ("pickle by another name", b"\x80\x02ccollections\nOrderedDict\n" + b"q" * 64, None, "is a pickle"),
    ("zip by another name", b"PK\x03\x04" + b"\x00" * 4 + b"q" * 64, None, "is a zip archive"),
    ("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", None, "git lfs pull"),
    ("web page", b"<!DOCTYPE html><html>404</html>", None, "is a web page"),
    ("gguf by another name", b"GGUF\x03\x00\x00\x00" + b"q" * 64, None, "is a GGUF file"),
]


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def bank(base: Any) -> Any:
    return veneer.attach(base)


def fingerprint(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def refusal(bank: Any, folder: Path, attempts: int = 3, **options: Any) -> tuple[str, float]:
    """(message, the least processor time in ms) of loading a folder that must be refused."""
    least = math.inf
    for _ in range(attempts):
        start = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            bank.load(folder, name="x", **options)
        least = min(least, 1000 * (time.process_time() - start))
    return str(caught.value), least


@pytest.mark.parametrize(("tensors", "settings", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_it_is_refused_and_says_why(
    bank: Any, base: Any, tmp_path: Path, tensors: Any, settings: Any, says: str
) -> None:
    """The message names what is wrong, in less than 50 ms, without the base or the bank being touched."""
    before = fingerprint(base)
    folder = make_folder(tmp_path / "hostile", tensors, settings)
    message, milliseconds = refusal(bank, folder)
    assert says in message
    assert milliseconds < 50
    assert fingerprint(base) == before
    assert bank.names == []
    assert message.isprintable() or "\n" in message


@pytest.mark.parametrize(("tensors", "settings"), [case[1:3] for case in CASES], ids=[case[0] for case in CASES])
def test_memory_stays_small(bank: Any, tmp_path: Path, tensors: Any, settings: Any) -> None:
    """What Python and the reader allocate on the way to a refusal is less than twice the file and 1 MB."""
    folder = make_folder(tmp_path / "hostile", tensors, settings)
    size = sum(file.stat().st_size for file in folder.iterdir())
    tracemalloc.start()
    try:
        refusal(bank, folder, attempts=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size + (1 << 20)


HARMLESS: list[tuple[str, Mapping[str, Tensor] | None, dict[str, Any], str]] = [
    ("regex in target_modules", None, config(target_modules=BOMB), "is not evaluated"),
    ("regex in rank_pattern", None, config(rank_pattern={BOMB: 3}), "ranks are those of the tensors"),
    ("regex in exclude_modules", None, config(exclude_modules=BOMB), ""),
    (
        "library in auto_mapping",
        None,
        config(auto_mapping={"parent_library": "os"}),
        "auto_mapping in adapter_config.json is ignored",
    ),
    (
        "zero change",
        {k: v * ("lora_A" in k) for k, v in q_tensors().items()},
        config(),
        "the change is zero at every site",
    ),
    ("denormal", with_value("lora_A.weight", 1e-42), config(), ""),
    ("magnitude 0", dora(0.0), config(use_dora=True), "1 magnitudes are zero or negative"),
    ("magnitude -1", dora(-1.0), config(use_dora=True), "1 magnitudes are zero or negative"),
    ("empty unknown key", None, config(twist=None, turn={}, bend=False), ""),
]


@pytest.mark.parametrize(
    ("tensors", "settings", "says"), [case[1:] for case in HARMLESS], ids=[case[0] for case in HARMLESS]
)
def test_what_is_harmless_loads_and_is_told(tmp_path: Path, tensors: Any, settings: Any, says: str) -> None:
    """Patterns are not compiled, so they cannot hang; what is unusual and harmless is a note."""
    base = tiny("llama", tie_word_embeddings=False)
    bank = veneer.attach(base)
    start = time.process_time()
    adapter = bank.load(make_folder(tmp_path / "odd", tensors, settings), name="x")
    assert time.process_time() - start < 1
    assert any(says in note for note in adapter.meta["notes"])
    with bank.use("x"):
        assert outputs(base).isfinite().all()


def test_all_problems_come_in_one_error(bank: Any, tmp_path: Path) -> None:
    """Settings, names and shapes are told together, one problem a line."""
    tensors = {
        **q_tensors(),
        f"{Q0}.lora_A.weight": torch.zeros(4, 31),
        "stray": torch.zeros(1),
        f"{Q0}.base_layer.weight": torch.zeros(1),
    }
    message, _ = refusal(bank, make_folder(tmp_path / "x", tensors, config(r=5, arrow_config={"top_k": 1})))
    for part in (
        "expected shape (4, 32)",
        "stray is not part",
        "base_layer.weight is not part",
        "declares rank 5",
        "arrow_config",
    ):
        assert part in message
    assert message.splitlines()[0].endswith("problems")


def many_values() -> dict[str, Tensor]:
    tensors = q_tensors()
    for value in tensors.values():
        value[0, 0] = math.nan
    return tensors


def test_all_bad_numbers_come_in_one_error(bank: Any, tmp_path: Path) -> None:
    """Every tensor with numbers that are not finite is named."""
    message, _ = refusal(bank, make_folder(tmp_path / "x", many_values()))
    assert message.count("are not finite") == 4


def test_force_overrides_what_it_names_and_keeps_it_on_record(bank: Any, tmp_path: Path) -> None:
    """An overridden refusal is a note; other refusals stand; a word that is not known is refused with the list."""
    folder = make_folder(tmp_path / "x", None, config(lora_alpha=500_000, twist=1))
    assert 'force="config"' in refusal(bank, folder, force="scale")[0]
    base = tiny("llama")
    adapter = veneer.attach(base).load(folder, name="x", force=("scale", "config"))
    assert sum(note.startswith("overridden by force") for note in adapter.meta["notes"]) == 3
    assert "it can name" in refusal(bank, folder, force="everything")[0]


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt", "adapter_model.pkl"]
)
def test_pickles_are_refused_unopened(bank: Any, tmp_path: Path, name: str) -> None:
    """A pickle is not opened at all, and the message says how to convert it."""
    folder = make_folder(tmp_path / "x")
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).mkdir()  # opening it would fail in another way
    message, milliseconds = refusal(bank, folder)
    assert "is a pickle" in message and "save_pretrained" in message
    assert milliseconds < 50


def test_a_folder_that_is_no_adapter_says_what_it_is(bank: Any, tmp_path: Path) -> None:
    """A model's folder, an empty one, one without settings, and none at all are told apart."""
    model = tmp_path / "model"
    model.mkdir()
    assert "holds no adapter_model.safetensors" in refusal(bank, model)[0]
    (model / "config.json").write_text("{}")
    assert "holds a base model, not an adapter" in refusal(bank, model)[0]
    alone = make_folder(tmp_path / "alone")
    (alone / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in refusal(bank, alone)[0]
    assert "does not exist" in refusal(bank, tmp_path / "nowhere")[0]
