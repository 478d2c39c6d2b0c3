"""Fingerprints: they tell stored tensors apart, and do not tell how a tensor was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny

from veneer.errors import BaseModelError
from veneer.models import fingerprint
from veneer.models.fingerprint import weight_fingerprints
from veneer.models.load import load_base

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def test_a_file_counts_as_stored_whatever_dtype_it_is_loaded_in(tmp_path: Path) -> None:
    """A bf16 file has one fingerprint, loaded as bf16 or fp32; and it is the one of the bf16 tensor in memory."""
    model = tiny("llama", dtype=torch.bfloat16)
    folder = _save(model, tmp_path / "base")
    wide = weight_fingerprints(load_base(folder, dtype="float32"), [Q, K])
    assert wide == weight_fingerprints(load_base(folder, dtype="bfloat16"), [Q, K])
    assert wide == weight_fingerprints(model, [Q, K])
    assert wide != weight_fingerprints(model.float(), [Q, K])


def test_names_that_change_while_loading(tmp_path: Path) -> None:
    """A weight that the files name otherwise than the model is found in them: its dtype is the file's, whatever it is loaded in."""
    model = tiny("gpt_neox", dtype=torch.bfloat16)
    folder = _save(model, tmp_path / "base")
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    assert weight_fingerprints(load_base(folder, dtype="float32"), ["lm_head.weight"]) == weight_fingerprints(
        model, ["lm_head.weight"]
    )


def test_shards_have_the_fingerprints_of_one_file(tmp_path: Path) -> None:
    """How the tensors are spread over files does not matter."""
    model = tiny("llama")
    names = [name for name, _ in model.named_parameters()]
    one = _save(model, tmp_path / "one")
    many = _save(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    found = weight_fingerprints(load_base(one), names)
    assert len(set(found.values())) == len(names)
    assert weight_fingerprints(load_base(many), names) == found == weight_fingerprints(model, names)


@pytest.mark.parametrize("change", ["one bit", "name", "shape", "dtype"])
def test_any_difference_changes_it(change: str) -> None:
    """One bit of the bytes, the name, the shape or the dtype."""
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        layer[0].weight.zero_()
        layer[1].weight.zero_()
    (before,) = weight_fingerprints(layer, ["0.weight"]).values()
    name = "0.weight"
    if change == "one bit":
        layer[0].weight.data[3, 3] = torch.tensor(1).to(torch.int32).view(torch.float32)
    elif change == "name":
        name = "1.weight"
    elif change == "shape":
        layer[0].weight.data = torch.zeros(2, 8)
    else:
        layer[0].weight.data = torch.zeros(4, 4, dtype=torch.bfloat16)
    (after,) = weight_fingerprints(layer, [name]).values()
    assert before != after


def test_a_view_counts_by_its_values_and_not_by_its_strides() -> None:
    """A transposed weight has the fingerprint of its contiguous copy."""
    layer = torch.nn.Linear(6, 4, bias=False)
    layer.weight.data = torch.arange(24.0).view(6, 4).T
    (strided,) = weight_fingerprints(layer, ["weight"]).values()
    layer.weight.data = layer.weight.data.contiguous()
    assert weight_fingerprints(layer, ["weight"]) == {"weight": strided}


def test_a_tied_head_is_found_under_the_weight_that_it_shares(tmp_path: Path) -> None:
    """The file holds the embedding only, and both names have a fingerprint that does not depend on the dtype in memory."""
    folder = _save(tiny("llama", tie_word_embeddings=True, dtype=torch.bfloat16), tmp_path / "base")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    found = weight_fingerprints(load_base(folder, dtype="float32"), names)
    assert found == weight_fingerprints(load_base(folder, dtype="bfloat16"), names)
    assert found[names[0]] != found[names[1]]


def test_a_body_finds_its_weights_in_a_file_with_a_prefix(tmp_path: Path) -> None:
    """A model saved with its head names its tensors ``bert.*``; its body alone finds them."""
    model = tiny("bert", dtype=torch.bfloat16)
    base = load_base(_save(model, tmp_path / "bert"), dtype="float32")
    base.model = base.model.bert
    name = "encoder.layer.0.attention.self.query.weight"
    assert weight_fingerprints(base, [name]) == weight_fingerprints(model.bert, [name])


def test_digests_are_computed_once_for_a_file_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call reads no tensor; another content, time or inode makes another key; a broken cache is ignored."""
    folder = _save(tiny("llama"), tmp_path / "base")
    read: list[str] = []
    of_file = fingerprint._of_file
    monkeypatch.setattr(fingerprint, "_of_file", lambda name, entry: read.append(name) or of_file(name, entry))
    base = load_base(folder, dtype="float32")
    first = weight_fingerprints(base, [Q])
    assert weight_fingerprints(base, [Q, K])[Q] == first[Q] and read == [Q, K]
    (cached,) = (tmp_path / "home" / "fingerprints").glob("*.json")
    cached.write_text("[broken")
    assert weight_fingerprints(base, [Q]) == first and read == [Q, K, Q]
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[Q][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert weight_fingerprints(load_base(folder, dtype="float32"), [Q]) != first
    assert read == [Q, K, Q, Q]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints come all the same."""
    base = load_base(_save(tiny("llama"), tmp_path / "base"), dtype="float32")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "file" / "home"))
    assert weight_fingerprints(base, [Q]) == weight_fingerprints(base.model, [Q])


def test_an_unknown_weight_and_a_damaged_file_are_errors(tmp_path: Path) -> None:
    """Both are named."""
    base = load_base(_save(tiny("llama"), tmp_path / "base"), dtype="float32")
    with pytest.raises(BaseModelError, match="nope"):
        weight_fingerprints(base, ["nope.weight"])
    file = tmp_path / "base" / "model.safetensors"
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(BaseModelError, match="ends before"):
        weight_fingerprints(base, [name for name, _ in base.model.named_parameters()])
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(BaseModelError, match="safetensors"):
        weight_fingerprints(base, [Q])
