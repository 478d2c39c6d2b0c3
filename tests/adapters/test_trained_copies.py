"""Methods that train copies of the base's own parameters: BitFit and full fine-tuning."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.adapters.made import CASES, bits, merged_model, nudge, portrait, values
from tests.checkpoints.helpers import load_peft, outputs
from tests.tiny import tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

import veneer
from veneer.adapters import Adapter, BitFit, Full, LoRA, Method, attach
from veneer.errors import AdapterError, CheckpointError, TargetError

LAYERS = [name for name in CASES if not name.endswith("one-vector")]
METHODS: dict[str, Method] = {"full": Full(target_modules="layer"), "bitfit": BitFit(target_modules="layer")}


def moved(bank: veneer.Bank, name: str, method: Method, seed: int = 1, **more: object) -> Adapter:
    return nudge(bank.add(name, method, seed=seed), seed=seed, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "name"), list(itertools.product(METHODS, LAYERS)))
def test_a_copy_acts_in_place_of_the_base(kind: str, name: str) -> None:
    """A new adapter changes no bit; a moved one computes what the merged layer does; nothing stays behind."""
    case = CASES[name]
    model, x = case.model(), case.input()
    before, expected = portrait(model), model(x)
    bank = attach(model)
    if kind == "bitfit" and getattr(model.layer, "bias", None) is None:
        with pytest.raises(TargetError, match=r"none of the 1 layers .* has a bias"):
            bank.add("a", METHODS[kind])
        return
    bank.add("a", METHODS[kind])
    held = values(model)
    with bank.use("a"):
        assert torch.equal(bits(model(x)), bits(expected))
        model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank["a"].parameters())
    nudge(bank["a"])
    with bank.use("a"), torch.no_grad():
        found = model(x)
    assert (found - expected).abs().max() > 1e-2
    assert (merged_model(bank, "a")(x) - found).norm() <= 2e-6 * found.norm()
    assert torch.equal(model(x), expected) and values(model) == held
    bank.remove("a")
    assert portrait(model) == before


def test_merging_gives_the_trained_weights_to_the_bit(tmp_path: Path) -> None:
    """Merged in memory, every parameter is the adapter's own tensor, whatever its size beside the base's."""
    model = tiny("gpt2")
    bank = veneer.attach(model)
    adapter = moved(bank, "a", Full(target_modules="all", exclude_modules=("wte",)), by=1e-6)
    merged = bank.merged_state_dict("a")
    for layer, tensors in adapter.overrides.items():
        for key, value in tensors.items():
            assert torch.equal(merged[f"{layer}.{key}"], value)
    assert sum(map(len, adapter.overrides.values())) == 27


def test_the_last_blocks_alone() -> None:
    """FT-Top2 of GPT-2 medium has the 25.19 million parameters of its paper; of a block everything is trained, norms too."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    bank = attach(model)
    bank.add("top2", Full(target_modules="all", layers_to_transform=(22, 23)))
    assert (
        bank["top2"].num_parameters() == 2 * sum(p.numel() for p in model.transformer.h[0].parameters()) == 25_192_448
    )


@pytest.mark.parametrize(("width", "layers", "expected"), [(768, 12, 102_144), (1024, 24, 271_360)])
def test_bitfit_counts_of_roberta(width: int, layers: int, expected: int) -> None:
    """L(4d + f + d + 2d) + d biases, without the classification head."""
    config = RobertaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4 * width
    )
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    bank = attach(model)
    bank.add("a", BitFit())
    assert bank["a"].num_parameters() == expected


def test_rows_of_one_batch_are_as_each_alone() -> None:
    """Base, LoRA, BitFit and full rows, and a mix of them, are within 2e-6 of each alone; a NaN stays in its row."""
    model = tiny("opt")
    bank = veneer.attach(model)
    methods: dict[str, Method] = {"lora": LoRA(r=2), "bitfit": BitFit(), "full": Full(layers_to_transform=(1,))}
    for seed, (name, method) in enumerate(methods.items()):
        moved(bank, name, method, seed=seed, by=0.05)
    routes = ["lora", None, "bitfit", "full", {"bitfit": 0.5, "lora": 0.25}, "lora"]
    ids = torch.randint(1, 60, (len(routes), 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with bank.use(routes):
            together = model(input_ids=ids).logits
        for row, route in enumerate(routes):
            with bank.use(route):
                alone = model(input_ids=ids[row : row + 1]).logits[0]
            assert (together[row] - alone).abs().max() <= 2e-6, route
        list(bank["bitfit"].parameters())[-1].fill_(torch.nan)
        with bank.use(routes):
            again = model(input_ids=ids).logits
    clean = [0, 1, 3, 5]
    assert torch.equal(again[clean], together[clean]) and bool(again[2].isnan().any())


@pytest.mark.parametrize("method", [BitFit(), Full(layers_to_transform=(0,)), BitFit(target_modules=("fc1", "norm"))])
def test_a_folder_is_read_back_and_read_by_peft(method: Method, tmp_path: Path) -> None:
    """The same method with its options, the same output to the bit; PEFT's output within 1e-5; an altered method is refused."""
    if method.target_modules == ("fc1", "norm"):
        method = BitFit(target_modules=("fc1", "final_layer_norm"), layers_to_transform=(1,))
    model = tiny("opt")
    bank = veneer.attach(model)
    moved(bank, "a", method)
    with bank.use("a"):
        expected = outputs(model)
    bank.save("a", tmp_path / "a")
    adapter = bank.load(tmp_path / "a", name="b")
    assert adapter.method == method and adapter.meta["notes"] == []
    assert adapter.num_parameters() == bank["a"].num_parameters()
    with bank.use("b"):
        assert torch.equal(outputs(model), expected)
    assert (outputs(load_peft(tiny("opt"), tmp_path / "a")) - expected).abs().max() <= 1e-5
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"bias": "all"', '"bias": "none"').replace("fc1", "fc2"))
    with pytest.raises(CheckpointError):
        bank.load(tmp_path / "a", name="c")


def test_a_tied_embedding_is_trained_with_its_head_or_not_at_all() -> None:
    """Training the embedding alone would untie it; with ensure_weight_tying both have one tensor."""
    bank = veneer.attach(tiny("gpt2"))
    with pytest.raises(TargetError, match="wte and lm_head share one weight"):
        bank.add("a", Full(target_modules="all"))
    adapter = bank.add("a", Full(target_modules="all", ensure_weight_tying=True))
    assert adapter.overrides["lm_head"]["weight"] is adapter.overrides["transformer.wte"]["weight"]
    assert bank.unties("a") == []


def test_stacked_experts_are_refused_in_one_sentence() -> None:
    """Copies of single experts cannot be trained."""
    bank = veneer.attach(tiny("mixtral"))
    with pytest.raises(TargetError, match=r"does not act on stacked experts, such as .*; leave them out"):
        bank.add("a", Full())
    assert isinstance(bank.model, nn.Module) and bank.names == []


def test_what_has_no_factors_says_so() -> None:
    """Composition and reduction of a BitFit adapter end in a sentence."""
    from veneer.deltas.delta import site_delta

    bank = veneer.attach(tiny("opt"))
    adapter = moved(bank, "a", BitFit())
    with pytest.raises(AdapterError, match="it changes biases, which have no low-rank factors"):
        site_delta(adapter, next(iter(adapter.overrides)))
