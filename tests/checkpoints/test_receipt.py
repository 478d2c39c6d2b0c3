"""Receipts: the wrong base, an edited folder and a damaged file are seen when an adapter is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.helpers import outputs, read_file, stir
from tests.tiny import tiny
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.checkpoints import read_adapter, receipt
from veneer.errors import CheckpointError

METHODS = {
    "lora": LoRA(r=4, target_modules=("q_proj", "down_proj")),
    "dora": DoRA(r=4, target_modules=("q_proj", "down_proj")),
}


def trained(base: nn.Module, method: Any, folder: Path, **options: Any) -> Any:
    """A bank with adapter "a", trained by appearance, saved in ``folder``."""
    bank = veneer.attach(base)
    adapter = bank.add("a", method, seed=41)
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    bank.save("a", folder, **options)
    return bank


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_base_is_silent(method: Any, tmp_path: Path) -> None:
    """On the base that it was made on an adapter loads without a note, with its seed and the caller's hashes."""
    trained(tiny("llama"), method, tmp_path / "a", receipt={"data": "d" * 64, "template": "t" * 64})
    adapter = veneer.attach(tiny("llama")).load(tmp_path / "a", name="b")
    assert adapter.meta["notes"] == []
    assert adapter.seed == 41
    found = adapter.meta["receipt"]
    assert (found["data"], found["template"], found["version"]) == ("d" * 64, "t" * 64, veneer.__version__)
    assert set(found["base"]) == set(found["probes"]) == set(adapter.tensors)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_another_base_of_the_same_shape_is_refused(method: Any, tmp_path: Path) -> None:
    """Same architecture, other weights: refused, unless forced, and then on record."""
    trained(tiny("llama"), method, tmp_path / "a")
    other = tiny("llama", seed=1)
    bank = veneer.attach(other)
    with pytest.raises(
        CheckpointError, match="this is not the base that the adapter was made on: 4 of 4 adapted weights differ"
    ):
        bank.load(tmp_path / "a")
    assert bank.names == []
    notes = bank.load(tmp_path / "a", force="base").meta["notes"]
    assert any(note.startswith('overridden by force="base"') for note in notes)
    with bank.use("a"):
        assert outputs(other).isfinite().all()


def moved(by: float) -> Callable[[nn.Module], None]:
    def move(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data.add_(
                by
                * parameter.data.norm()
                / parameter.numel() ** 0.5
                * torch.randn(parameter.shape, generator=generator)
            )

    return move


def quantise(model: nn.Module) -> None:
    """Round every matrix to sixteen levels a row, as a 4-bit copy has."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            step = parameter.data.abs().amax(1, keepdim=True) / 7.5
            parameter.data.copy_((parameter.data / step).round() * step)


@pytest.mark.parametrize("change", [moved(0.001), moved(0.03), quantise], ids=["revision", "instruct", "quantised"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_relative_of_the_base_is_refused_with_how_far_it_is(
    method: Any, change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Another revision, the instruct model or a quantised copy is refused, with the difference in percent, unless forced."""
    trained(tiny("llama"), method, tmp_path / "a")
    base = tiny("llama")
    change(base)
    bank = veneer.attach(base)
    with pytest.raises(CheckpointError, match=r"a relative of the base .* differ, by \d+\.\d% on average"):
        bank.load(tmp_path / "a")
    assert bank.load(tmp_path / "a", force="base").meta["notes"]


def test_a_base_that_says_it_is_quantised_is_told(tmp_path: Path) -> None:
    """Where the model itself says that it is quantised, a small difference is what to expect: a note."""
    trained(tiny("llama"), METHODS["lora"], tmp_path / "a")
    base = tiny("llama")
    quantise(base)
    base.config.quantization_config = {"quant_method": "round"}
    notes = veneer.attach(base).load(tmp_path / "a").meta["notes"]
    assert len(notes) == 1 and notes[0].startswith("the base is quantised")


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_base_in_another_precision_is_a_note(
    method: Any, there: torch.dtype, here: torch.dtype, tmp_path: Path
) -> None:
    """A base held in other bits is the same base: loaded, and said."""
    trained(tiny("llama").to(torch.bfloat16).to(there), method, tmp_path / "a")
    notes = veneer.attach(tiny("llama").to(torch.bfloat16).to(here)).load(tmp_path / "a").meta["notes"]
    assert len(notes) == (there != here)
    assert all("beyond rounding its weights are the same" in note for note in notes)


@pytest.mark.parametrize("key", ["lora_alpha", "use_rslora", "alpha_pattern"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_settings_changed_after_training_are_seen(method: Any, key: str, tmp_path: Path) -> None:
    """The probe at each site depends on the scale, so an edited adapter_config.json is refused."""
    trained(tiny("llama"), method, tmp_path / "a")
    edit(tmp_path / "a", **{key: {"lora_alpha": 33, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}[key]})
    with pytest.raises(CheckpointError, match="is not what the receipt's probe recorded"):
        veneer.attach(tiny("llama")).load(tmp_path / "a")
    assert veneer.attach(tiny("llama")).load(tmp_path / "a", force="receipt").meta["notes"]


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    """One bit of one weight: the checksum differs."""
    trained(tiny("llama"), METHODS["lora"], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum differs"):
        veneer.attach(tiny("llama")).load(tmp_path / "a")
    with pytest.raises(CheckpointError, match="checksum differs"):
        read_adapter(tmp_path / "a")


def test_another_adapters_settings_do_not_fit(tmp_path: Path) -> None:
    """A folder that was mixed from two saves is refused."""
    trained(tiny("llama"), METHODS["lora"], tmp_path / "a")
    trained(tiny("llama"), METHODS["lora"].model_copy(update={"lora_alpha": 5.0}), tmp_path / "b")
    (tmp_path / "a" / "adapter_config.json").write_bytes((tmp_path / "b" / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"adapter_config\.json was altered"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not usable JSON"),
        ("[]", "is of format"),
        ('{"format":2}', "is of format 2"),
        ('{"format":1}', "checksum differs"),
        ('{"format":1,"tensors":"SUM","base":{},"probes":{}}', "no usable record of the base's weight"),
        ('{"format":1,"tensors":"SUM","probes":{}}', "probes are of other sites"),
    ],
)
def test_a_broken_receipt_is_refused(text: str, says: str, tmp_path: Path) -> None:
    """A receipt that cannot be read, or that lacks what it must have, is refused and not passed over."""
    bank = trained(tiny("llama"), METHODS["lora"], tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    header, data = read_file(path)
    note = json.loads(header["__metadata__"]["veneer"])
    header["__metadata__"]["veneer"] = text.replace("SUM", note["tensors"])
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with pytest.raises(CheckpointError, match=says):
        bank.load(tmp_path / "a", name="again")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_saving_again_gives_the_same_bytes(method: Any, tmp_path: Path) -> None:
    """An adapter saved twice, and a loaded one saved again, give the same files to the byte."""
    bank = trained(tiny("llama"), method, tmp_path / "a")
    bank.save("a", tmp_path / "b")
    other = veneer.attach(tiny("llama"))
    other.load(tmp_path / "a")
    other.save("a", tmp_path / "c")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1


@pytest.mark.parametrize("arch", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("name", METHODS)
def test_a_probe_is_the_change_put_to_a_fixed_vector(arch: str, name: str) -> None:
    """The eight numbers equal those of the dense change, for linear layers, Conv1D and convolutions, gain included."""
    base = tiny(arch)
    bank = veneer.attach(base)
    targets = {"llama": ("q_proj", "embed_tokens"), "gpt2": ("c_attn", "wte"), "vit": ("q_proj", "projection")}[arch]
    adapter = bank.add("a", type(METHODS[name])(r=3, target_modules=targets))
    stir(nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    for path in adapter.tensors:
        site = bank.sites[path]
        delta = adapter.delta_2d(path, site.weight_2d).detach()
        expected = torch.tensor(receipt.eight(delta @ receipt.signs(delta.shape[1], path), path))
        got = torch.tensor(receipt.probe(adapter, path, site.weight_2d))
        assert expected.norm() > 0
        assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_signs_are_the_same_everywhere() -> None:
    """The fixed vectors are a function of the name alone: these values must never change, or old receipts would fail."""
    assert receipt.signs(12, "model.layers.0.self_attn.q_proj").tolist() == SIGNS
    assert abs(float(receipt.signs(100_000, "x").mean())) < 0.02


SIGNS = [-1, 1, 1, -1, 1, -1, 1, 1, 1, 1, -1, -1]


def test_weights_changed_in_memory_are_seen(tmp_path: Path) -> None:
    """The model's folder has the right weights, the model in memory no longer has: refused."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    trained(load(), METHODS["lora"], tmp_path / "a")
    assert veneer.attach(load()).load(tmp_path / "a").meta["notes"] == []
    assert veneer.attach(load().to(torch.bfloat16)).load(tmp_path / "a").meta["notes"] != []
    changed = copy.deepcopy(load())
    moved(0.03)(changed)
    with pytest.raises(CheckpointError, match="a relative of the base"):
        veneer.attach(changed).load(tmp_path / "a")


def test_without_a_model_what_can_be_checked_is_checked(tmp_path: Path) -> None:
    """read_adapter needs no base: tensors, receipt and LoRA's probes are verified, and the adapter can be put into a bank."""
    bank = trained(tiny("gpt2"), LoRA(r=3, target_modules=("c_attn",)), tmp_path / "a")
    with bank.use("a"):
        expected = outputs(bank.model)
    adapter = read_adapter(tmp_path / "a", "alone")
    assert adapter.kinds == bank["a"].kinds
    other = veneer.attach(tiny("gpt2"))
    other.insert(adapter)
    with other.use("alone"):
        assert torch.equal(outputs(other.model), expected)
