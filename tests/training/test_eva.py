"""EVA: the first A of each layer against PEFT's, the ranks that layers share, and runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.made import QUIET, World, digest, examples, options

from veneer.adapters import DoRA, LoRA
from veneer.data.example import Example
from veneer.errors import AdapterError, ConfigError, TargetError
from veneer.models.load import Base
from veneer.training import train
from veneer.training.eva import Components, explained, shared_ranks

CHOSEN = ["q_proj", "k_proj", "o_proj", "gate_proj"]
GENERATOR = torch.Generator().manual_seed(0)


def rows_of_variance(count: int) -> torch.Tensor:
    """Rows [N, 6] with a different variance in each direction, and a mean."""
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR))[0]
    return torch.randn(count, 6, generator=GENERATOR) * spread @ turn + 3.0


def test_components_of_parts_are_those_of_the_whole() -> None:
    """Updated over parts of any size, vectors, values and shares are those of one decomposition of all centred rows."""
    rows = rows_of_variance(90)
    components = Components(6)
    for part in rows.split([40, 7, 43]):
        components.update(part, torch.Generator().manual_seed(1))
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.svd(centred.double(), full_matrices=False)[1:]
    assert components.vectors_KD is not None and components.values_K is not None
    assert torch.allclose(components.values_K.double(), values, rtol=1e-4)
    assert torch.allclose((components.vectors_KD.double() * vectors).sum(1).abs(), torch.ones(6).double(), atol=1e-4)
    assert components.shares() == pytest.approx((values**2 / (values**2).sum()).tolist(), rel=1e-3)
    assert sum(components.shares()) == pytest.approx(1.0, rel=1e-5)


def test_layers_share_the_budget() -> None:
    """The largest shares are kept, wherever they are; a layer may end with none."""
    shares = {"a": [0.6, 0.3, 0.05], "b": [0.9, 0.02, 0.01], "c": [0.04, 0.03]}
    assert shared_ranks(shares, 3) == {"a": 2, "b": 1, "c": 0}
    assert shared_ranks(shares, 4) == {"a": 3, "b": 1, "c": 0}


def test_the_first_a_is_that_of_peft() -> None:
    """The same base and rows through PEFT's initialize_lora_eva_weights: the same A up to signs, at the supervised tokens only."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import initialize_lora_eva_weights
    from tests.tiny import tiny

    # Few tokens, and some of them often: directions that are far apart in their variance, which a randomized decomposition finds exactly.
    few = random.Random(0).choices([7, 50, 90, 130], [8, 4, 2, 1], k=24 * 6)
    rows = [Example(tuple(few[at : at + 6]), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)) for at in range(0, len(few), 6)]
    world = World()
    found = explained(
        LoRA(r=2, target_modules=CHOSEN, init_lora_weights="eva", eva_rho=1.0),
        world.bank,
        world.runner,
        shifted(rows),
        0,
    )
    world.bank.add("a", found.method)
    found.fill(world.bank, "a")
    sizes = {key: getattr(world.model.config, key) for key in ("num_hidden_layers", "hidden_size")}
    model = tiny("llama", **sizes, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    model.load_state_dict(world.model.state_dict())
    settings = LoraConfig(
        r=2, target_modules=CHOSEN, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(model, settings, low_cpu_mem_usage=True)
    ids = torch.tensor([row.ids for row in rows])
    labels = torch.where(torch.tensor([row.weights for row in rows]) > 0, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    assert len(found.factors) == len(CHOSEN)
    for site, mine in found.factors.items():
        module: Any = theirs.get_submodule(f"base_model.model.{site}")
        expected = module.lora_A["default"].weight.detach()
        assert torch.equal(world.bank["a"].tensors[site]["lora_A"].detach(), mine)
        assert torch.allclose((mine * expected).sum(1).abs(), torch.ones(2), atol=2e-3), site


def shifted(rows: list[Example]) -> list[Example]:
    """Examples whose weights stand one token later: a weight is for predicting a token, and PEFT looks at that token's own inputs."""
    found = []
    for row in rows:
        weights = (*[0.0], *row.weights[:-1])
        found.append(Example((*row.ids, 3), (*weights, 1.0)))
    return found


def test_a_run_begins_as_the_base_with_other_ranks_and_resumes(place: Path, base: Base, tmp_path: Path) -> None:
    """Ranks differ and add up to the budget; the first loss is the base's; a stopped run ends with the same bits."""
    own: dict[str, Any] = {"name": "a", "init_lora_weights": "eva", "method": "dora", "rank_pattern": {"o_proj": 4}}
    own |= {"valid": (place / "valid.jsonl",)}
    result = train(options(place, tmp_path / "whole", **own), base=base, console=QUIET)
    plain = train(
        options(place, tmp_path / "plain", **{**own, "init_lora_weights": "gaussian"}), base=base, console=QUIET
    )
    assert result.jobs["a"].losses[0] == plain.jobs["a"].losses[0]
    ranks = {name: len(a) for name, a in factors_in(tmp_path / "whole" / "adapter").items()}
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 4 and sum(ranks.values()) == 2 * 6 + 4
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET)
    train(options(place, tmp_path / "part", **own), base=base, console=QUIET, resume_from="step-00000010")
    assert digest(tmp_path / "whole") == digest(tmp_path / "part")


def factors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The A factors in a folder."""
    return {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in name}


def test_eva_needs_rows_and_linear_layers() -> None:
    """One sentence for an adapter without rows, for another kind of layer, and for its option without it."""
    world = World()
    with pytest.raises(AdapterError, match="eva, which looks at training rows"):
        world.bank.add("a", DoRA(r=2, init_lora_weights="eva"))
    method = LoRA(r=2, init_lora_weights="eva", target_modules="embed_tokens")
    with pytest.raises(TargetError, match="embed_tokens: eva looks at the inputs of linear layers"):
        explained(method, world.bank, world.runner, examples(3), 0)
    with pytest.raises(ConfigError, match="eva_rho is part of init_lora_weights: eva"):
        train(data=("rows.jsonl",), eva_rho=3.0)
