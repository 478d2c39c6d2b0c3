"""Which dtype is fast here: told by the CPU's own flags, or by torch where there are none to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from veneer.models import precision
from veneer.models.precision import fast_dtype


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is known of this machine is asked anew, before and after."""
    precision._cpu_flags.cache_clear()
    yield
    precision._cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", torch.bfloat16),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm\n", torch.bfloat16),
        ("flags\t\t: fpu avx2 avx512f\n", torch.float32),
        ("Features\t: fp asimd\n", torch.float32),
        ("model name\t: bf16 avx512_bf16\n", torch.float32),
    ],
    ids=["avx512", "amx", "arm", "avx512 without bf16", "arm without bf16", "only in the name"],
)
def test_a_cpus_flags_decide(text: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 where the instructions for it are listed, fp32 elsewhere."""
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    assert fast_dtype("cpu") == expected


@pytest.mark.parametrize("has", [True, False])
def test_without_flags_torch_is_asked(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc/cpuinfo."""

    def missing(self: Path, **options: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)
    assert fast_dtype() == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_is_asked_for_bf16_of_its_own(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulation does not count."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    assert fast_dtype("cuda:1") == (torch.bfloat16 if has else torch.float32)


def test_generating_takes_bf16_only_where_it_was_seen_to_be_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AMX; other CPUs with bf16 train in it and generate in fp32."""
    for flags, expected in (("avx512_bf16 amx_bf16", torch.bfloat16), ("avx512_bf16", torch.float32)):
        precision._cpu_flags.cache_clear()
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags, **options: f"flags: {flags}\n")
        assert fast_dtype("cpu") == torch.bfloat16
        assert fast_dtype("cpu", "generate") == expected


def test_an_unknown_device_gets_the_safe_dtype() -> None:
    """fp32 is right everywhere."""
    assert fast_dtype("meta") == torch.float32
