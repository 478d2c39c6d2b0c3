"""Adapters on wrapped models: the wrapper calls them, and its name is in no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from veneer import LoRA, attach, bank_of
from veneer.errors import AdapterError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def trained(model: Any) -> Any:
    """A bank with an adapter "a" whose change is not zero."""
    bank = attach(model)
    bank.add("a", LoRA(r=2), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank


def test_a_wrapped_model_takes_adapters_under_clean_names(tmp_path: Path) -> None:
    """Logits through the wrapper are those of the plain model with the same adapter, and the files are the same."""
    plain, wrapped = tiny("llama"), nn.DataParallel(tiny("llama"))
    expected, bank = trained(plain), trained(wrapped)
    assert bank_of(wrapped) is bank
    with torch.no_grad(), expected.use("a"), bank.use("a"):
        assert torch.allclose(wrapped(IDS).logits, plain(IDS).logits, atol=1e-5)
    for one, folder in ((expected, "plain"), (bank, "wrapped")):
        one.save("a", tmp_path / folder)
    assert (tmp_path / "plain" / "adapter_config.json").read_bytes() == (
        tmp_path / "wrapped" / "adapter_config.json"
    ).read_bytes()
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "wrapped")]
    assert list(files[0]) == list(files[1])


def test_wrapped_modules_inside_the_model_are_refused() -> None:
    """A wrapper around a block changes the names of its layers; the message names the block."""
    model = tiny("llama")
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    with pytest.raises(AdapterError, match=r"model\.layers\.0 is wrapped by an activation checkpointing wrapper"):
        attach(model)


def test_a_compiled_model_is_refused() -> None:
    """torch.compile cannot trace adapters; the message names the model inside."""
    compiled: Any = torch.compile(tiny("llama"), backend="eager")
    for model in (compiled, nn.DataParallel(compiled)):
        with pytest.raises(AdapterError, match=r"attach to the model inside it \(model\._orig_mod\)"):
            attach(model)
    assert attach(compiled._orig_mod).sites


INSIDE = {
    "module.": lambda key: f"module.{key}",
    "_orig_mod.": lambda key: f"_orig_mod.{key}",
    "module._orig_mod.": lambda key: f"module._orig_mod.{key}",
    "_fsdp_wrapped_module.": lambda key: f"_fsdp_wrapped_module.{key}".replace(
        ".0.self", ".0._fsdp_wrapped_module.self"
    ),
    "_checkpoint_wrapped_module.": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("prefix", INSIDE)
def test_files_with_a_wrappers_names_are_read(prefix: str, tmp_path: Path) -> None:
    """Files that other programs saved through a wrapper load like any other; a tensor under both names is refused."""
    bank = trained(tiny("llama"))
    bank.save("a", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({INSIDE[prefix](key): value for key, value in tensors.items()}, file)
    other = attach(tiny("llama"))
    other.load(tmp_path / "a", "b")
    for key, value in bank["a"].tensors.items():
        assert all(torch.equal(other["b"].tensors[key][name], tensor) for name, tensor in value.items())
    first = next(key for key in tensors if INSIDE[prefix](key) != key)
    save_file({**tensors, INSIDE[prefix](first): tensors[first].clone()}, file)
    with pytest.raises(Exception, match="are the same tensor of the same layer"):
        attach(tiny("llama")).load(tmp_path / "a", "c")
