"""Parameter counts that papers and other tools publish, on the shapes of the real models, without a weight in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.adapters import DoRA, LoRA, attach
from veneer.errors import AdapterError


def of(architecture: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """A transformers model of these shapes, to be made on the meta device."""

    def make() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, architecture)(getattr(transformers, config)(**fields))
        return model

    return make


class Block(nn.Module):
    """A block of GPT-3 as its paper draws it: four square projections and a feed-forward of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT3(nn.Module):
    """GPT-3 175B: 96 blocks of width 12,288."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50257, 12288)
        self.blocks = nn.ModuleList(Block(12288) for _ in range(96))
        self.head = nn.Linear(12288, 50257, bias=False)


roberta = of("RobertaForSequenceClassification", "RobertaConfig", vocab_size=50265, max_position_embeddings=514)
llama8b = of(
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
llama3b = of(
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("make", "method", "count"),
    [
        pytest.param(roberta, LoRA(r=8, target_modules=("query", "value")), 294_912, id="roberta-base"),
        pytest.param(GPT3, LoRA(r=4, target_modules=("q", "v")), 18_874_368, id="gpt-3-175b"),
        pytest.param(llama8b, LoRA(r=1), 2_621_440, id="llama-3.1-8b"),
        pytest.param(llama8b, LoRA(r=16), 16 * 2_621_440, id="llama-3.1-8b-r16"),
        pytest.param(llama3b, DoRA(r=32, target_modules=("q_proj", "v_proj")), 9_289_728, id="llama-3.2-3b-dora"),
        pytest.param(lambda: nn.Linear(1000, 1000, bias=False), LoRA(r=5), 10_000, id="one-layer"),
    ],
)
def test_published_counts(make: Callable[[], nn.Module], method: LoRA | DoRA, count: int) -> None:
    """The adapter has as many parameters as published, and none of them takes memory."""
    with torch.device("meta"):
        model = make()
    adapter = attach(model).add("a", method)
    assert adapter.num_parameters() == count
    assert all(parameter.is_meta for parameter in adapter.parameters())


def test_one_layer_is_one_percent() -> None:
    """Rank 5 on a layer of 1000 x 1000 is 1 % of it."""
    model = nn.Linear(1000, 1000, bias=False)
    adapter = attach(model).add("a", LoRA(r=5))
    assert adapter.num_parameters() == 0.01 * sum(p.numel() for p in model.parameters())


def test_the_real_shapes_are_the_ones_meant() -> None:
    """The models counted on are of the sizes that their names say."""
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in (("8b", llama8b), ("3", GPT3))}
        three = sum(p.numel() for p in llama3b().parameters())
    assert round(sizes["8b"] / 1e9, 2) == 8.03
    assert round(sizes["3"] / 1e9) == 175
    assert round(three / 1e9, 2) == 3.21


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2)], ids=["lora", "dora"])
def test_values_cannot_come_from_nowhere(method: LoRA | DoRA) -> None:
    """An adapter made on a base without weights does not turn into numbers when the base gets them: using it is an error."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    bank = attach(model)
    bank.add("a", method)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(0.0)
    with pytest.raises(AdapterError, match=r"0\.lora_A.*no values.*add it again"), bank.use("a"):
        model(torch.ones(1, 4))
    bank.remove("a")
    bank.add("a", method)
    with bank.use("a"):
        assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 4.0))


def test_a_whole_forward_on_meta() -> None:
    """Shapes go through an adapted model on the meta device, row by row too, as planning needs them."""
    with torch.device("meta"):
        model = of(
            "LlamaForCausalLM", "LlamaConfig", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2
        )()
        ids = torch.zeros(2, 5, dtype=torch.long)
    bank = attach(model)
    bank.add("a", DoRA(r=4))
    with bank.use("a"):
        out: Tensor = model(input_ids=ids).logits
    assert out.is_meta and out.shape == (2, 5, 64)
