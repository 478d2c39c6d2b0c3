"""Which layers an adapter takes, and what is said where a pattern cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import Tensor, nn
from torch.nn.utils import prune

from veneer.adapters import DoRA, LoRA, attach
from veneer.errors import ConfigError, TargetError

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
V0, V1 = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"
LAST = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def chosen(arch: str = "llama", **options: Any) -> list[str]:
    return list(attach(tiny(arch)).add("a", LoRA(r=2, **options)).tensors)


def refused(arch: str = "llama", **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        attach(tiny(arch)).add("a", LoRA(r=2, **options))
    return str(caught.value)


def test_all_linear_is_every_linear_layer_of_the_blocks() -> None:
    """The default takes the linear layers of all blocks and neither head nor embeddings."""
    found = chosen()
    assert len(found) == 14 and {name.rpartition(".")[2] for name in found} == LAST
    assert chosen(target_modules="all-linear") == chosen(target_modules=("all-linear",)) == found


@pytest.mark.parametrize(
    ("arch", "count", "absent"),
    [
        ("gpt2", 8, "lm_head"),
        ("opt", 12, "project_out"),
        ("phi3", 8, "lm_head"),
        ("bert", 12, "decoder"),
        ("vit", 12, "classifier"),
        ("t5", 32, "lm_head"),
        ("falcon", 8, "lm_head"),
        ("llama_classifier", 14, "score"),
        ("mamba", 6, "dt_proj"),
        ("qwen2_moe", 40, "gate"),
        ("deberta_v2", 16, "decoder"),
        ("modernbert", 8, "decoder"),
    ],
)
def test_all_linear_on_other_architectures(arch: str, count: int, absent: str) -> None:
    """Conv1D and encoders count too; heads, layers that are never called and routers are passed by."""
    found = chosen(arch)
    assert len(found) == count
    assert not [name for name in found if name.rpartition(".")[2] == absent]


def test_all_linear_without_blocks() -> None:
    """A model without a list of blocks has all its linear layers taken, but for its head; a lone layer is one too."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.classifier = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    assert list(attach(Classifier()).add("a", LoRA(r=1)).tensors) == ["first", "second"]
    assert list(attach(nn.Linear(3, 3)).add("a", LoRA(r=1)).tensors) == [""]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("q_proj", [Q0, Q1]),
        (("q_proj", "v_proj"), [Q0, V0, Q1, V1]),
        ("0.self_attn.q_proj", [Q0]),
        (Q1, [Q1]),
        ("layers.0.*.q_proj", [Q0]),
        ("model.layers.?.self_attn.[qv]_proj", [Q0, V0, Q1, V1]),
        (r"re:.*\.0\.self_attn\.(q|v)_proj", [Q0, V0]),
        (("re:.*0.*q_proj", "layers.1.*.v_proj"), [Q0, V1]),
        ("lm_head", ["lm_head"]),
        ("embed_tokens", ["model.embed_tokens"]),
    ],
)
def test_patterns_name_sites(patterns: Any, expected: list[str]) -> None:
    """A name is the tail of a path, a glob covers a path or its tail, an expression must match the whole path."""
    assert chosen(target_modules=patterns) == expected


def test_a_name_is_a_whole_part_of_a_path() -> None:
    """proj names nothing, though many names end in it."""
    assert "matches nothing" in refused(target_modules="proj")


def test_exclusions_and_layers() -> None:
    """Sites can be left out by the same patterns, and blocks be chosen by number."""
    assert chosen(target_modules=("q_proj", "v_proj"), exclude_modules="v_proj") == [Q0, Q1]
    assert chosen(target_modules="q_proj", exclude_modules=r"re:.*\.0\..*") == [Q1]
    assert chosen(target_modules="q_proj", layers_to_transform=(1,)) == [Q1]
    assert len(chosen(layers_to_transform=(0,))) == 7


def test_all_misses_are_told_at_once_with_near_misses_and_the_inventory() -> None:
    """Each pattern that matches nothing is named, with what is near and what the model has."""
    text = refused(target_modules=("q_prj", "v_proj", "w1"), exclude_modules=("k_proj",), rank_pattern={"o_proj": 3})
    assert text.startswith("the adapter's sites cannot be chosen: 4 problems")
    assert '"q_prj" matches nothing (did you mean q_proj' in text
    assert "down_proj (2)" in text and "lm_head (1)" in text and "embed_tokens (1)" in text
    assert '"w1" matches nothing' in text and '"v_proj" matches' not in text
    assert 'exclude_modules: "k_proj" matches none of the sites that target_modules chose' in text
    assert 'rank_pattern: "o_proj" matches none of the adapted sites' in text


def test_a_broken_expression_is_told_once() -> None:
    """An expression that does not compile is an error with the reason, not a pattern that matches nothing."""
    text = refused(target_modules=("re:(q_proj", "v_proj"))
    assert '"re:(q_proj" is not a regular expression: missing )' in text
    assert text.count("re:(q_proj") == 1 and "matches nothing" not in text
    assert "is not a regular expression" in refused(target_modules="q_proj", exclude_modules="re:[")
    assert "is not a regular expression" in refused(target_modules="q_proj", alpha_pattern={"re:*": 3.0})


def test_layers_that_are_not_there() -> None:
    """A block number out of range is named beside the range; so is a selection from which nothing is left."""
    assert "layers_to_transform: block 7 holds none of the chosen sites (blocks: 0 to 1)" in refused(
        layers_to_transform=(0, 7)
    )
    assert "no site is left" in refused(target_modules="q_proj", exclude_modules="q_proj")
    assert "block 0 holds none" in refused(target_modules="lm_head", layers_to_transform=(0,))


@pytest.mark.parametrize(
    ("arch", "pattern", "reason"),
    [
        ("mamba", "dt_proj", "was not called in the dry run"),
        ("mamba", "conv1d", "Conv1d layers are not supported"),
        ("opt", "embed_positions", "OPTLearnedPositionalEmbedding overrides Embedding.forward"),
        ("t5", "shared", "was not called"),
    ],
)
def test_places_that_cannot_be_adapted_say_why(arch: str, pattern: str, reason: str) -> None:
    """An unsupported layer, or one that is never called, is an error with the reason; all-linear skips it and the bank lists it."""
    text = refused(arch, target_modules=pattern)
    assert reason in text and "which cannot be adapted" in text
    bank = attach(tiny(arch))
    listed = {**bank.uncovered, **{name: site.reason for name, site in bank.sites.items() if site.reason}}
    assert any(name.endswith(pattern) and reason in why for name, why in listed.items())
    assert not any(name in listed for name in bank.add("a", LoRA(r=2)).tensors)


class Odd(nn.Module):
    """Layers that only look as if they could be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.pruned = nn.Linear(4, 4)
        prune.l1_unstructured(self.pruned, "weight", amount=0.5)  # type: ignore[no-untyped-call]
        self.lazy = nn.LazyLinear(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.renormed = nn.Embedding(4, 4, max_norm=1.0)
        self.noisy = Noisy(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.volume = nn.Conv3d(1, 1, 2)
        self.whole = nn.Linear(4, 4)
        self.whole.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


class Noisy(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("parametrized", "computed from other parameters"),
        ("spectral", "computed from other parameters"),
        ("pruned", "computed from other parameters"),
        ("lazy", "no shape before the first forward"),
        ("grouped", "groups > 1"),
        ("renormed", "max_norm"),
        ("noisy", "Noisy overrides Linear.forward and computes something else"),
        ("in_proj_weight", "is not a module"),
        ("volume", "Conv3d layers are not supported"),
        ("whole", "torch.int8"),
    ],
)
def test_layers_that_compute_something_else_are_refused(name: str, reason: str) -> None:
    """Weights that are computed, quantized or rewritten, and forwards that are another function, are not sites; each says why."""
    model = Odd()
    bank = attach(model)
    with pytest.raises(TargetError) as caught:
        bank.add("a", LoRA(r=2, target_modules=name))
    assert reason in str(caught.value)
    assert set(bank.add("b", LoRA(r=2)).tensors) == {"plain", "attention.out_proj"}


def test_attach_leaves_a_spectral_norm_alone() -> None:
    """Looking at a weight that is computed in training mode would move its buffers: attach does not look."""
    model = Odd().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attach(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_ranks_and_alphas_by_pattern() -> None:
    """The first pattern that names a site gives its rank or alpha; others keep the method's."""
    method = LoRA(
        r=4, lora_alpha=8, rank_pattern={"0.self_attn.q_proj": 2, "q_proj": 3}, alpha_pattern={"re:.*v_proj": 5.0}
    )
    adapter = attach(tiny("llama")).add("a", method)
    assert (adapter.rank(Q0), adapter.rank(Q1), adapter.rank(V0)) == (2, 3, 4)
    assert (adapter.alpha(Q0), adapter.alpha(V1)) == (8.0, 5.0)
    assert adapter.scale(Q0) == 4.0 and adapter.scale(V0) == 1.25


def test_options_out_of_range_are_errors_of_ours() -> None:
    """A mistake in the options of a method is told as any other option's: with the name, what was expected and a near miss."""
    for options, text in (
        ({"r": 0}, "r"),
        ({"rank": 8}, "did you mean r?"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": 3}, "target_modules"),
    ):
        for method in (LoRA, DoRA):
            with pytest.raises(ConfigError, match="invalid ") as caught:
                method(**options)
            assert text in str(caught.value)
