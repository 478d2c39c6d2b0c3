"""Layers that PEFT reads in a way of its own: how they are written, what ``all-linear`` leaves out, and what is said of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints.architectures import build, logits
from tests.checkpoints.helpers import load_peft
from tests.checkpoints.peft_table import trial
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.checkpoints.peft import portable
from veneer.checkpoints.peft.portable import remarks
from veneer.cli.main import main

LIMIT = 1e-5
MIXTURES = ("deepseek_v3", "afmoe", "longcat_flash", "beam")
EXPERTS = {arch: {"exclude_modules": ("experts",)} for arch in ("deepseek_v3", "afmoe")}
"""Options that leave out stacked experts, which PEFT does not read from these folders."""


def names(sites: Iterable[str]) -> set[str]:
    return {site.rpartition(".")[2] for site in sites}


def offered(line: str) -> tuple[str, ...]:
    """The targets that a remark ends with."""
    return tuple(line.rpartition("--target-modules ")[2].split(","))


def test_the_tables_are_those_of_peft() -> None:
    """The names that PEFT converts and refuses are the ones written down here."""
    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as conversion

    assert {
        kind: frozenset(table) for kind, table in conversion._MOE_TARGET_MODULE_MAPPING.items()
    } == portable.CONVERTED
    source = inspect.getsource(tuners_utils._check_lora_target_modules_mamba)
    sets = [line.partition(" = ")[2] for line in source.splitlines() if line.strip().endswith('"}')]
    assert [set(json.loads(text.replace("{", "[").replace("}", "]"))) for text in sets[1:]] == [
        portable.REFUSED,
        portable.REFUSED_IN,
    ]


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"down_proj": 5, "0.mlp.up_proj": 2}, "alpha_pattern": {"gate_proj": 3.0}},
        {"lora_dropout": 0.25, "modules_to_save": ("lm_head",)},
        {"bias": "all", "target_modules": ("re:.*self_attn.*", "all-linear")},
    ],
    ids=["patterns", "dropout and head", "biases"],
)
def test_layers_of_a_mixture_are_written_as_parameters(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT computes the same from target_parameters with ranks and scales by pattern, saved heads and biases; dropout is kept."""
    if arch == "longcat_flash" and "rank_pattern" in options:
        options = {**options, "rank_pattern": {"down_proj": 5, "0.mlps.0.up_proj": 2}}
    distance, effect, _ = trial(build(arch), LoRA(r=3, lora_alpha=6, **EXPERTS.get(arch, {}), **options), tmp_path)
    assert effect > 1e-2 and distance <= LIMIT
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"gate_proj", "up_proj"} <= names(name.removesuffix(".weight") for name in settings["target_parameters"])
    assert names(settings["target_modules"]).isdisjoint({"gate_proj", "up_proj", "down_proj", "gate"})
    bank = veneer.attach(build(arch))
    assert bank.load(tmp_path, name="a").method.lora_dropout == options.get("lora_dropout", 0.0)


@pytest.mark.parametrize("arch", [*MIXTURES, "mamba", "falcon_h1", "nemotron_h"])
def test_all_linear_leaves_out_what_peft_cannot_read(arch: str, tmp_path: Path) -> None:
    """The default targets of a DoRA adapter are read by PEFT; what they leave out is said with the option that takes it, and that
    adapter is said to be unreadable, with targets that are read."""
    model = build(arch)
    bank = veneer.attach(model)
    left = bank.add("default", DoRA(r=2, **EXPERTS.get(arch, {})))
    (line,) = remarks(bank, left)
    assert line.startswith("all-linear leaves out ")
    every = bank.add("every", DoRA(r=2, target_modules=offered(line), **EXPERTS.get(arch, {})))
    assert set(left.tensors) < set(every.tensors)
    assert names(set(every.tensors) - set(left.tensors)) <= {"gate", "gate_proj", "up_proj", "down_proj", "out_proj"}
    (line,) = remarks(bank, every)
    assert line.startswith("PEFT cannot read this adapter at ")
    readable = bank.add("readable", DoRA(r=2, target_modules=offered(line)))
    assert set(readable.tensors) == set(left.tensors) and remarks(bank, readable) == []
    if arch == "beam":  # PEFT drops its tensors without an error
        return
    bank.save("every", tmp_path)
    with pytest.raises(ValueError, match=r"ParamWrapper does not work with use_dora|incompatible with Mamba"):
        load_peft(build(arch), tmp_path)


def test_a_bias_of_b_is_left_out_too() -> None:
    """PEFT's parameters take no bias of B, so all-linear leaves those layers out; elsewhere nothing is."""
    bank = veneer.attach(build("deepseek_v3"))
    some = EXPERTS["deepseek_v3"]
    assert "gate_proj" not in names(bank.add("a", LoRA(r=2, lora_bias=True, **some)).tensors)
    assert "gate_proj" in names(bank.add("b", LoRA(r=2, **some)).tensors)
    plain = veneer.attach(build("llama"))
    assert plain.not_portable(DoRA()) == {} and remarks(plain, plain.add("a", DoRA(r=2))) == []


@pytest.mark.parametrize("arch", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4"])
def test_experts_are_written_as_peft_reads_them(arch: str, tmp_path: Path) -> None:
    """The default targets take experts, whose factors PEFT reads separately or stacked, but not with DoRA, which the note says."""
    distance, effect, _ = trial(build(arch), LoRA(r=4, lora_alpha=8, lora_dropout=0.1), tmp_path)
    assert effect > 1e-2 and distance <= LIMIT
    bank = veneer.attach(build(arch))
    assert bank.load(tmp_path, name="a").method.lora_dropout == 0.1
    line = remarks(bank, bank.add("b", DoRA(r=2)))[-1]
    assert line.startswith("PEFT cannot read this adapter at ") and "stacked experts as bare parameters" in line
    readable = bank.add("c", DoRA(r=2, target_modules=offered(line)))
    assert not any(bank.sites[site].stack for site in readable.tensors) and remarks(bank, readable) == []


def test_an_incomplete_folder_of_parameters_is_refused(tmp_path: Path) -> None:
    """A layer that target_parameters names and the file lacks is a missing tensor."""
    bank = veneer.attach(build("deepseek_v3"))
    bank.add("a", LoRA(r=2, exclude_modules=("experts", "1.mlp.shared_experts.up_proj")))
    bank.save("a", tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert "up_proj.weight" not in settings["target_parameters"]
    file.write_text(
        json.dumps({**settings, "target_parameters": ["up_proj.weight", "gate_proj.weight", "down_proj.weight"]})
    )
    with pytest.raises(veneer.errors.VeneerError, match=r"shared_experts\.up_proj.*no tensors for"):
        veneer.attach(build("deepseek_v3")).load(tmp_path)


def test_names_that_the_table_changes_are_stored_as_it_reads_them(tmp_path: Path) -> None:
    """Laguna's shared experts are stored under the name that becomes today's when transformers' table is applied."""
    trial(build("laguna"), LoRA(r=3, lora_alpha=6, exclude_modules=("experts",)), tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "base_model.model.model.layers.1.mlp.shared_expert.up_proj.lora_A.weight" in stored
    assert not any("shared_experts" in name for name in stored)


def saved(model: nn.Module, folder: Path, seeds: Iterable[int]) -> list[Path]:
    """A base in a folder, and adapters on it."""
    model.save_pretrained(folder / "base")
    bank = veneer.attach(model)
    for seed in seeds:
        adapter = bank.add(f"a{seed}", LoRA(r=2, lora_alpha=4, exclude_modules=("experts",)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        bank.save(f"a{seed}", folder / f"a{seed}", base_name=str(folder / "base"))
    bank.detach()
    return [folder / f"a{seed}" for seed in seeds]


def test_composed_and_extracted_adapters_are_read_too(tmp_path: Path) -> None:
    """What compose makes of two adapters on a mixture of experts, and what extract finds in a merged one, PEFT reads as the mix."""
    one, two = saved(build("deepseek_v3"), tmp_path, (1, 2))
    assert main(["compose", f"{one}:0.5", f"{two}:0.5", "--out", str(tmp_path / "sum")]) == 0
    assert main(["merge", str(tmp_path / "sum"), "--out", str(tmp_path / "merged")]) == 0
    words = ["extract", "--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "merged"), "--rank", "4"]
    assert main([*words, "--out", str(tmp_path / "found")]) == 0
    bank = veneer.attach(build("deepseek_v3"))
    for folder in (one, two):
        bank.load(folder)
    with bank.use({"a1": 0.5, "a2": 0.5}):
        expected = logits(bank.model)
    for name in ("sum", "found"):
        found = logits(load_peft(build("deepseek_v3"), tmp_path / name))
        assert (found - expected).abs().max() <= 1e-3, name
