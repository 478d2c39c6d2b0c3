"""Heads, embeddings, norms, biases and tokens of an adapter's own: trained by a run, taken up again, saved, and the same in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.checkpoints.helpers import load_peft, outputs
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, digest, options, write_rows
from tests.training.test_run import stop_after
from transformers import AutoTokenizer

import veneer
from veneer.data.chat.render import Renderer
from veneer.data.dataset import load_examples
from veneer.errors import CheckpointError, DataError
from veneer.models.load import load_base
from veneer.training import train

UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "head and norms": ("llama", UNTIED, {"modules_to_save": ("lm_head", "norm", "input_layernorm")}),
    "embedding that stays tied": ("llama", TIED, {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}),
    "tokens": ("llama", UNTIED, {"trainable_token_indices": ("1", "2")}),
    "tokens, tied": ("llama", TIED, {"trainable_token_indices": ("1", "2")}),
    "tokens, dora": ("qwen3", TIED, {"trainable_token_indices": ("3",), "method": "dora"}),
    "biases": ("opt", {}, {"bias": "all"}),
    "biases of adapted layers": ("opt", {}, {"bias": "lora_only"}),
    "bitfit": ("opt", {}, {"method": "bitfit"}),
    "full fine-tuning": ("opt", {}, {"method": "full"}),
    "a bias of B": ("llama", UNTIED, {"lora_bias": True}),
}


def prepared(folder: Path, arch: str, sizes: dict[str, Any]) -> Path:
    """A folder with a base in ``base`` and rows."""
    tiny(arch, **sizes).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "train.jsonl", 37)
    return folder


def chosen(place: Path, out: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Options with tokens given as numbers."""
    words = extra.get("trainable_token_indices")
    if words:
        tokenizer = AutoTokenizer.from_pretrained(place / "base")
        extra = {**extra, "trainable_token_indices": tuple(tokenizer.convert_tokens_to_ids(word) for word in words)}
    return options(place, place / out, target_modules=("q_proj",), steps=8, **extra)


@pytest.mark.parametrize("case", CASES)
def test_what_is_its_own_is_trained_resumed_and_saved(case: str, tmp_path: Path) -> None:
    """Every value moves; a run that was stopped and goes on ends with the same bits; PEFT computes the same to 1e-5."""
    arch, sizes, extra = CASES[case]
    place = prepared(tmp_path, arch, sizes)
    result = train(chosen(place, "a", extra), console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(chosen(place, "b/a", extra), console=stop_after(3))
    train(chosen(place, "b/a", extra), console=QUIET)
    assert digest(place / "a") == digest(place / "b" / "a")

    base = load_base(place / "base", dtype="float32")
    bank = veneer.attach(base.model)
    adapter = bank.load(result.adapter, name="a")
    assert adapter.meta["notes"] == [] and adapter.overrides
    for name, own in adapter.overrides.items():
        module: Any = base.model.get_submodule(name)
        for key, value in own.items():
            if key == "rows":
                assert not torch.equal(value, module.weight[list(adapter.tokens[name])])
                assert value.shape[0] == len(adapter.tokens[name])
            elif key != "lora_bias":
                assert not torch.equal(value, getattr(module, key))
    with bank.use("a"):
        expected = outputs(base.model)
    theirs = load_peft(load_base(place / "base", dtype="float32").model, result.adapter)
    assert (outputs(theirs) - expected).abs().max() <= 1e-5


def grown(place: Path) -> list[int]:
    """Two words added to the vocabulary of the base in ``place``, and rows that hold them; returns their numbers."""
    base = load_base(place / "base", dtype="float32")
    base.tokenizer.add_tokens(["qqsum", "qqend"])
    torch.manual_seed(3)
    base.model.resize_token_embeddings(len(base.tokenizer))
    base.model.save_pretrained(place / "grown")
    base.tokenizer.save_pretrained(place / "grown")
    text = (place / "train.jsonl").read_text().replace('"content": "', '"content": "qqsum ', 2)
    (place / "train.jsonl").write_text(text.replace('"}]}', ' qqend"}]}', 5))
    return [base.tokenizer.convert_tokens_to_ids(word) for word in ("qqsum", "qqend")]


@pytest.mark.filterwarnings("ignore:.*mean_resizing.*")
def test_new_tokens_are_learnt_on_a_resized_vocabulary(tmp_path: Path) -> None:
    """Only their rows are stored; the folder loads on the resized base and says on the first one how to resize it."""
    place = prepared(tmp_path, "llama", TIED)
    new = grown(place)
    given = options(
        place,
        tmp_path / "a",
        base=str(place / "grown"),
        target_modules=("q_proj",),
        trainable_token_indices=tuple(new),
        steps=20,
    )
    result = train(given, console=QUIET)
    stored = load_file(result.adapter / "adapter_model.safetensors")
    rows = [value for key, value in stored.items() if "trainable_tokens_delta" in key]
    assert [tuple(value.shape) for value in rows] == [(2, 32)]
    bank = veneer.attach(load_base(place / "grown", dtype="float32").model)
    assert bank.load(result.adapter, name="a").meta["notes"] == []
    with pytest.raises(CheckpointError, match="resize the base first"):
        veneer.attach(load_base(place / "base", dtype="float32").model).load(result.adapter)


def test_tokens_that_no_example_holds_are_refused(tmp_path: Path) -> None:
    """A row that nothing teaches is not saved as if it had been learnt: the token is named by number and text."""
    place = prepared(tmp_path, "llama", UNTIED)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    examples, _ = load_examples([place / "train.jsonl"], Renderer(tokenizer))
    absent = next(i for i in range(319, 0, -1) if all(i not in example.ids for example in examples))
    with pytest.raises(
        DataError, match=rf"no example contains the token {absent} \('.*'\), so their rows cannot be learnt"
    ):
        train(options(place, tmp_path / "a", trainable_token_indices=(absent,)), console=QUIET)
    assert not (tmp_path / "a").exists()
