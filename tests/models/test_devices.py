"""Devices: what a name means, what is refused, and several tensors in one copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.devices import PretendDevice
from tests.tiny import tiny, tiny_tokenizer

import veneer
from veneer.cli.doctor import examine
from veneer.errors import ConfigError
from veneer.models.devices import resolve_device, together
from veneer.models.precision import slow_dtype_notes


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU here; on a machine with GPUs the first, or that of the process; Apple's on a Mac."""
    assert resolve_device("auto") == torch.device("cpu")
    with PretendDevice():
        assert resolve_device("auto") == torch.device("cuda:0") == resolve_device("cuda")
        assert resolve_device("cpu") == torch.device("cpu")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert resolve_device("auto") == torch.device("cuda:1")
        assert resolve_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == resolve_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda", "is built without CUDA; install a build with CUDA, or use cpu"),
        ("cuda:3", "cuda:3 cannot be used"),
        ("mps", "mps is Apple's GPU, and PyTorch finds none on this machine; use auto or cpu"),
        ("gpu", "expected auto, cpu, cuda, cuda:N or mps, found 'gpu'"),
        ("cuda:x", "found 'cuda:x'"),
    ],
)
def test_a_device_that_is_not_there(name: str, words: str) -> None:
    """One sentence with the reason and the remedy."""
    with pytest.raises(ConfigError, match=words):
        resolve_device(name)


def test_tensors_travel_together() -> None:
    """Tensors of several types and sizes arrive as they were, in one copy; those that are there already are not copied."""
    given = [
        torch.arange(7),
        torch.tensor([0.5, -1.25, 3.0]),
        torch.zeros(0, dtype=torch.long),
        torch.arange(6, dtype=torch.int32).view(2, 3).T,
        torch.tensor([True, False, True]),
    ]
    assert all(one is other for one, other in zip(together(torch.device("cpu"), *given), given, strict=True))
    with PretendDevice() as device:
        there = torch.ones(2, device=device.device)
        device.moves.clear()
        found = together(device.device, *given, there)
        assert len(device.moves) == 1 and found[-1] is there
        assert all(one.device == device.device for one in found)
        assert all(
            one.dtype == other.dtype and torch.equal(one.cpu(), other) for one, other in zip(found, given, strict=False)
        )


def test_an_old_gpu_says_that_it_emulates_bfloat16() -> None:
    """bfloat16 that was asked for on a GPU without it is a note; float32 and a CPU need none."""
    with PretendDevice(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        (note,) = slow_dtype_notes(torch.bfloat16, torch.device("cuda:0"))
        assert note == "cuda:0 has no units for bfloat16 and emulates it slowly; use dtype float32"
        assert not slow_dtype_notes(torch.float32, torch.device("cuda:0"))
    assert not slow_dtype_notes(torch.bfloat16, torch.device("cpu"))


def test_a_base_goes_to_its_device_and_generates_there(tmp_path: Any) -> None:
    """load_base places every tensor; text from it is the CPU's, greedy and sampled."""
    from veneer.evaluate.generation import Generator, Sampling

    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def text(device: str) -> list[str]:
        base = veneer.load_base(tmp_path, dtype="float32", device=device)
        assert {value.device.type for value in base.model.state_dict().values()} == {device.partition(":")[0]}
        bank = veneer.attach(base.model)
        bank.add("a", veneer.LoRA(r=2))
        generator = Generator(base.model, base.tokenizer, bank)
        return [generator.write("1+1", "a", Sampling(8, heat, seed=3)) for heat in (0.0, 0.9)]

    expected = text("cpu")
    with PretendDevice():
        assert text("cuda:0") == expected


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_weights_go_to_the_device_one_by_one(tmp_path: Any, monkeypatch: Any, quantize: str | None) -> None:
    """The machine's memory never holds all of them; those that are quantized have the bits of the CPU, by which a run knows its base."""
    tiny("llama").save_pretrained(tmp_path)
    late: list[str] = []
    to = torch.nn.Module.to

    def noted(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        late.extend(name for name, value in module.named_parameters() if value.is_cpu)
        return to(module, *args, **options)

    expected = veneer.load_base(tmp_path, dtype="bfloat16", quantize=quantize).model.state_dict()
    monkeypatch.setattr(torch.nn.Module, "to", noted)
    with PretendDevice() as device:
        found = veneer.load_base(tmp_path, dtype="bfloat16", quantize=quantize, device="cuda:0").model.state_dict()
        assert found.keys() == expected.keys()
        scales = {name for name in found if "quant_state" in name}  # settings in bytes, made when they are asked for
        assert {found[name].device for name in found.keys() - scales} == {device.device}
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in found)
        assert not [name for name in late if quantize is None or "proj" in name]


def test_doctor_lists_devices(capsys: Any) -> None:
    """Each GPU with its memory and data type, and the one that is used by default."""
    with PretendDevice():
        checks = {check.name: check.value for check in examine()}
    assert checks["cuda:1"] == "a device that does not exist, 24.7 GB of 25.8 GB free, base weights in bfloat16"
    assert checks["device"] == "cuda:0 is used unless --device says otherwise"
    assert {check.name: check.value for check in examine()}["device"].startswith("cpu is used")
