"""Folders cross over to PEFT and back, and both compute the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.checkpoints.helpers import TARGETS, load_peft, outputs, peft_model, save_peft, stir
from tests.tiny import tiny

import veneer
import veneer.checkpoints
from veneer import DoRA, LoRA
from veneer.errors import CheckpointError

LIMIT = 1e-5
NO_RECEIPT = "no receipt: whether this is the base that the adapter was trained on is not known"

LOW_RANK: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}
PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "down_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "gpt2": {"rank_pattern": {"1.mlp.c_proj": 2}, "alpha_pattern": {"c_attn": 5, ".*\\.c_fc": 1}},
    "bert": {
        "rank_pattern": {"^bert.encoder.layer.0.attention.self.query$": 7},
        "alpha_pattern": {"attention.self.value": 64},
    },
}
EMBEDDINGS: dict[str, str] = {
    "llama": "embed_tokens",
    "gemma3": "embed_tokens",
    "gpt2": "wte",
    "opt": "embed_tokens",
    "bert": "word_embeddings",
}


def both_ways(arch: str, folder: Path, tiny_options: dict[str, Any] | None = None, **settings: Any) -> None:
    """PEFT's folder in ours, ours in PEFT: the same logits as the model that PEFT saved, and not the base's."""
    options = tiny_options or {}
    theirs = peft_model(tiny(arch, **options), **settings)
    expected = outputs(theirs)
    save_peft(theirs, folder / "theirs")
    base = tiny(arch, **options)
    plain = outputs(base)
    bank = veneer.attach(base)
    adapter = bank.load(folder / "theirs", name="a")
    assert NO_RECEIPT in adapter.meta["notes"]
    with bank.use("a"):
        ours = outputs(base)
    assert (expected - plain).abs().max() > 1e-2
    assert (ours - expected).abs().max() <= LIMIT
    bank.save("a", folder / "ours")
    again = load_peft(tiny(arch, **options), folder / "ours")
    assert (outputs(again) - expected).abs().max() <= LIMIT
    other = veneer.attach(tiny(arch, **options))
    assert other.load(folder / "ours", name="b").meta["notes"] == []
    with other.use("b"):
        assert torch.equal(outputs(other.model), ours)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("form", LOW_RANK)
def test_low_rank_adapters_cross_both_ways(arch: str, form: str, tmp_path: Path) -> None:
    """LoRA, rsLoRA and DoRA on every linear kind, biases and fused projections among them, agree to 1e-5 in fp32."""
    both_ways(arch, tmp_path, target_modules=TARGETS[arch], **LOW_RANK[form])


@pytest.mark.parametrize("arch", PATTERNS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_ranks_and_alphas_by_pattern_cross_both_ways(arch: str, dora: bool, tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern give each site the rank and scale that PEFT gives it."""
    both_ways(arch, tmp_path, target_modules=TARGETS[arch], use_dora=dora, **PATTERNS[arch])


@pytest.mark.parametrize("arch", EMBEDDINGS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embeddings_cross_both_ways(arch: str, dora: bool, tmp_path: Path) -> None:
    """An adapted embedding, scaled ones (Gemma) too, agrees; PEFT's copy of the base's embedding in the file is recognised."""
    both_ways(
        arch,
        tmp_path,
        target_modules=[EMBEDDINGS[arch], TARGETS[arch][0]],
        use_dora=dora,
        tiny_options={"tie_word_embeddings": False},
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolutions_cross_both_ways(dora: bool, tmp_path: Path) -> None:
    """A convolution (ViT's patches) agrees; DoRA's magnitude there has PEFT's four sizes in the file."""
    both_ways("vit", tmp_path, target_modules=["projection", "q_proj"], use_dora=dora)


@pytest.mark.parametrize(
    "method",
    [LoRA(r=3, lora_alpha=6), LoRA(r=3, lora_alpha=8, use_rslora=True), DoRA(r=3, lora_alpha=7.5)],
    ids=["lora", "rslora", "dora"],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bert", "qwen2_moe"])
def test_what_starts_here_loads_there(arch: str, method: LoRA | DoRA, tmp_path: Path) -> None:
    """An adapter made by Veneer on all linear layers loads in PEFT, which adapts the same layers, no more and no fewer. Experts are left
    out: PEFT reads those of a few architectures only."""
    base = tiny(arch)
    bank = veneer.attach(base)
    if bank.survey.stacks:
        method = method.model_copy(update={"exclude_modules": ("experts",)})
    adapter = bank.add("a", method)
    stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "")
    with bank.use("a"):
        expected = outputs(base)
    bank.save("a", tmp_path / "ours")
    theirs = load_peft(tiny(arch), tmp_path / "ours")
    adapted = {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == set(adapter.tensors)
    assert (outputs(theirs) - expected).abs().max() <= LIMIT


GROUPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "depthwise": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"patch_size": 2, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 8},
    ),
    "groups of four channels": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    ),
    "inside feed-forward layers": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [2], "hidden_sizes": [8], "patch_sizes": [3]}
        | {"strides": [2], "num_attention_heads": [2], "mlp_ratios": [2], "drop_path_rate": 0.0},
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_are_refused_beside_plain_ones(name: str, tmp_path: Path) -> None:
    """Plain convolutions of a network of grouped ones are PEFT's; a target that names a grouped one is refused with the reason."""
    import transformers

    model_class, config_class, fields = GROUPED[name]

    def made() -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields, num_labels=3))
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as they are drawn, the outputs of many layers vanish
                torch.nn.init.kaiming_normal_(parameter)
        return model.eval()

    base = made()
    bank = veneer.attach(base)
    convolutions = {path: part.groups for path, part in base.named_modules() if isinstance(part, torch.nn.Conv2d)}
    plain = tuple(path for path, groups in convolutions.items() if groups == 1)
    grouped = [path for path in convolutions if path not in plain]
    assert grouped and all("groups > 1" in bank.uncovered[path] for path in grouped)
    for path in (grouped[0], f"re:.*{grouped[-1]}"):
        with pytest.raises(veneer.errors.TargetError, match=r"groups > 1"):
            bank.add("b", LoRA(r=2, target_modules=(path,)))
    adapter = bank.add("a", LoRA(r=2, target_modules=plain))
    assert set(adapter.tensors) == set(plain)
    stir(torch.nn.ParameterDict({str(i): p for i, p in enumerate(adapter.parameters())}), "", by=0.05)
    with bank.use("a"):
        expected = outputs(base)
    assert (expected - outputs(base)).abs().max() > 1e-4
    bank.save("a", tmp_path)
    assert (outputs(load_peft(made(), tmp_path)) - expected).abs().max() <= LIMIT


@pytest.mark.parametrize(("init", "arch"), [("pissa", "llama"), ("olora", "llama"), ("pissa", "gpt2")])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_that_began_as_a_part_of_the_base_are_converted(
    init: str, arch: str, rslora: bool, dora: bool, tmp_path: Path
) -> None:
    """PiSSA and OLoRA folders, loaded with convert, compute what PEFT computes after rewriting the base; the base stays as it is."""
    theirs = peft_model(
        tiny(arch), target_modules=TARGETS[arch], init_lora_weights=init, use_rslora=rslora, use_dora=dora
    )
    expected = outputs(theirs)
    save_peft(theirs, tmp_path / "a")
    base = tiny(arch)
    plain = outputs(base)
    bank = veneer.attach(base)
    with pytest.raises(CheckpointError, match=r"veneer export FOLDER --to peft .*convert=True"):
        bank.load(tmp_path / "a")
    adapter = bank.load(tmp_path / "a", convert=True)
    assert {adapter.rank(site) for site in adapter.tensors} == {8}
    with bank.use("a"):
        assert (outputs(base) - expected).abs().max() <= 2e-5
    assert torch.equal(outputs(base), plain)
    bank.save("a", tmp_path / "plain")
    assert (outputs(load_peft(tiny(arch), tmp_path / "plain")) - expected).abs().max() <= 2e-5


def test_what_cannot_be_converted_says_so(tmp_path: Path) -> None:
    """OLoRA on a Conv1D, random or data-driven starts, and a missing base are refused with the other way out."""
    folder = save_peft(peft_model(tiny("gpt2"), target_modules=["c_attn"]), tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text())
    bank = veneer.attach(tiny("gpt2"))
    for init, says in (
        ("olora", "a conv1d layer, cannot be converted"),
        ("pissa_niter_4", "save it converted"),
        ("corda", "save it converted"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": init}))
        with pytest.raises(CheckpointError, match=says):
            bank.load(folder, convert=True)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))
    with pytest.raises(CheckpointError, match="veneer export FOLDER --to peft"):
        veneer.checkpoints.read_adapter(folder)


def test_what_peft_converted_itself_is_plain(tmp_path: Path) -> None:
    """A PiSSA adapter that PEFT saved as a difference loads as the LoRA that it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
        theirs = get_peft_model(tiny("llama"), settings)
        settings.init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        settings.init_lora_weights = "pissa"
        stir(theirs, "lora_")
        expected = outputs(theirs)
        theirs.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    bank = veneer.attach(tiny("llama"))
    bank.load(tmp_path / "a")
    with bank.use("a"):
        assert (outputs(bank.model) - expected).abs().max() <= 2e-5
