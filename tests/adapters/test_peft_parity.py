"""The same numbers as PEFT's, forward and in training, with the same tensors in both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters.made import nudge
from tests.adapters.peers import inputs_of, peft_tensor, peft_twin
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import Adapter, Bank, DoRA, LoRA, attach

ARCHS = ("llama", "qwen3", "gemma3", "gpt2", "opt", "phi3", "bert", "vit")
LIMIT = 1e-5
INPUT_LAYERS = {
    "llama": "embed_tokens",
    "qwen3": "embed_tokens",
    "gemma3": "embed_tokens",
    "gpt2": ("wte", "wpe"),
    "opt": "embed_tokens",
    "phi3": "embed_tokens",
    "bert": ("word_embeddings", "position_embeddings", "token_type_embeddings"),
    "vit": "projection",
}
PATTERNS: dict[str, dict[str, Any]] = {
    # A pattern of PEFT is the tail of a path, or an expression for it; a plain name means the same to both.
    "llama": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 11.0}},
    "qwen3": {"rank_pattern": {"o_proj": 1}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3.0, "q_proj": 5.0}},
    "gemma3": {"rank_pattern": {"mlp.gate_proj": 3}, "alpha_pattern": {"gate_proj": 9.0}},
    "gpt2": {"rank_pattern": {"c_attn": 6}, "alpha_pattern": {"mlp.c_proj": 2.0}},
    "opt": {"rank_pattern": {"fc1": 6}, "alpha_pattern": {"fc2": 2.0}},
    "phi3": {"rank_pattern": {"qkv_proj": 6}, "alpha_pattern": {"gate_up_proj": 2.0}},
    "bert": {"rank_pattern": {"attention.self.query": 6}, "alpha_pattern": {"output.dense": 2.0}},
    "vit": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 2.0}},
}


def method_for(kind: str, arch: str) -> LoRA | DoRA:
    """Options that the two name alike."""
    if kind == "rslora":
        return LoRA(r=4, lora_alpha=5, use_rslora=True)
    if kind == "patterns":
        return LoRA(r=4, lora_alpha=8, **PATTERNS[arch])
    if kind == "dora-patterns":
        return DoRA(r=4, lora_alpha=8, **PATTERNS[arch])
    if kind.startswith("input"):
        return (DoRA if "dora" in kind else LoRA)(r=4, lora_alpha=8, target_modules=INPUT_LAYERS[arch])
    return (DoRA if kind == "dora" else LoRA)(r=4, lora_alpha=8)


def pair(arch: str, method: LoRA | DoRA, **overrides: Any) -> tuple[nn.Module, Bank, Any]:
    """(our model, its bank with a nudged adapter "a", PEFT's model with the same)."""
    model: nn.Module = tiny(arch, **overrides)
    plain = copy.deepcopy(model)
    bank = attach(model)
    nudge(bank.add("a", method, seed=1), by=0.1)
    return model, bank, peft_twin(plain, bank["a"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora", "dora-patterns", "input-lora", "input-dora"])
def test_outputs_are_those_of_peft(arch: str, kind: str) -> None:
    """Logits agree within 1e-5 in fp32, in the fast form and in the plain one, and the adapter changes them by far more than that."""
    model, bank, theirs = pair(arch, method_for(kind, arch))
    batch = inputs_of(model)
    with torch.no_grad():
        base = model(**batch).logits
        expected = theirs(**batch).logits
        assert (expected - base).abs().max() > 100 * LIMIT
        for bank.fast_path in (True, False):
            with bank.use("a"):
                assert (model(**batch).logits - expected).abs().max() <= LIMIT


@pytest.mark.parametrize(("arch", "has_bias"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_dora_agrees_with_and_without_bias(arch: str, has_bias: bool) -> None:
    """The bias stays outside the gain, as in PEFT."""
    overrides = {"attention_bias": has_bias, "mlp_bias": has_bias} if arch == "llama" else {}
    model, bank, theirs = pair(arch, DoRA(r=4, lora_alpha=8), **overrides)
    biases = [site.layer_kind.bias(site.module) for site in bank.sites.values() if site.name in bank["a"].tensors]
    assert all((bias is not None) == has_bias for bias in biases)
    batch = inputs_of(model)
    with torch.no_grad(), bank.use("a"):
        assert (model(**batch).logits - theirs(**batch).logits).abs().max() <= LIMIT


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["lora", "dora", "input-lora", "input-dora"])
def test_gradients_are_those_of_peft(arch: str, kind: str) -> None:
    """Every tensor's gradient agrees, relative to its size, for a loss over all outputs."""
    model, bank, theirs = pair(arch, method_for(kind, arch))
    batch = inputs_of(model)
    with bank.use("a"):
        model(**batch).logits.square().mean().backward()
    theirs(**batch).logits.square().mean().backward()
    compared = 0
    for site, own in bank["a"].tensors.items():
        for key, value in own.items():
            expected = peft_tensor(theirs.base_model.model, site, key).grad
            assert value.grad is not None and expected is not None
            error = (value.grad - expected.reshape(value.shape)).norm()
            assert error <= 2e-4 * expected.norm() + 1e-7, (site, key)
            compared += 1
    assert compared == sum(map(len, bank["a"].tensors.values()))


def text_to_learn(arch: str = "llama") -> list[dict[str, Tensor]]:
    """Four batches that come round again: counting to eight from different starts; for ViT four images with their classes."""
    if arch == "vit":
        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return [{"pixel_values": part, "labels": torch.arange(4) % 2} for part in images.split(4)]
    rows = (torch.arange(16).unsqueeze(1) * 3 + torch.arange(12)) % 8 + 5
    return [{"input_ids": part, "labels": part} for part in rows.split(4)]


def trained(forward: Callable[..., Any], parameters: list[Any], optimizer: str, arch: str) -> list[float]:
    """Losses of twenty steps."""
    rate = {"sgd": 0.2, "adamw": 1e-2}[optimizer]
    chosen = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    steps = chosen(parameters, lr=rate)
    losses = []
    data = text_to_learn(arch)
    for step in range(20):
        loss = forward(**data[step % len(data)]).loss
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("arch", ARCHS)
def test_twenty_steps_are_those_of_peft(arch: str, kind: str, optimizer: str) -> None:
    """From the same start on data that can be learnt, losses agree at every step: within 1e-5 with SGD, 1e-4 with AdamW."""
    model: Any = tiny(arch)
    plain = copy.deepcopy(model)
    bank = attach(model)
    bank.add("a", method_for(kind, arch), seed=1)
    theirs = peft_twin(plain, bank["a"])
    with bank.use("a"):
        ours = trained(model, bank.parameters("a"), optimizer, arch)
    expected = trained(theirs, [p for p in theirs.parameters() if p.requires_grad], optimizer, arch)
    assert expected[-1] <= 0.8 * expected[0]
    worst = max(abs(one - other) for one, other in zip(ours, expected, strict=True))
    assert worst <= {"sgd": 1e-5, "adamw": 1e-4}[optimizer]


class _Masked(nn.Module):
    """Dropout with masks that are known beforehand."""

    def __init__(self, masks: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks[tuple(x.shape)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv2d"])
def test_dropout_of_dora_in_the_form_of_peft(has_bias: bool, conv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout_form="peft" and the same mask the output is PEFT's; the default form drops the low-rank branch only."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv2d(2, 3, 2, bias=has_bias) if conv else nn.Linear(6, 5, bias=has_bias)
    x = torch.randn(4, 2, 3, 3) if conv else torch.randn(4, 6)
    mask = torch.empty_like(x).bernoulli_(0.5) / 0.5
    results = {}
    for form in ("peft", "low_rank"):
        model = nn.Sequential(copy.deepcopy(layer))
        bank = attach(model)
        method = DoRA(r=2, lora_alpha=4, lora_dropout=0.5, dropout_form=form, target_modules="0")
        nudge(bank.add("a", method))
        monkeypatch.setattr("veneer.adapters.runtime.plain_path.drop", lambda x_n, *_: x_n * mask)
        bank.fast_path = False
        with bank.use("a", training=True):
            results[form] = model(x)
    theirs = peft_twin(nn.Sequential(layer), bank["a"]).train()
    theirs.base_model.model[0].lora_dropout["default"] = _Masked({tuple(x.shape): mask})
    expected = theirs(x)
    assert (results["peft"] - expected).abs().max() <= 1e-6
    site = bank.sites["0"]
    own: dict[str, Tensor] = dict(bank["a"].tensors["0"])
    scale = site.layer_kind.per_output(
        bank["a"].method.magnitude_scale(own, bank["a"].method.norm(own, site.weight_2d, site.squared_norms(), 2.0))
    )
    bias = 0 if layer.bias is None else site.layer_kind.per_output(layer.bias)
    low = site.layer_kind.low_rank(layer, x * mask, own["lora_A"], own["lora_B"]) * 2.0
    wanted = bias + scale * (layer(x) - bias + low)
    assert (results["low_rank"] - wanted).abs().max() <= 1e-6
    assert (results["low_rank"] - expected).abs().max() > 1e-2


def test_dropout_drops_the_fraction_that_was_asked_for() -> None:
    """Adapters drop in train() or where the route says so, each pass another mask, with the expected share and scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 1, bias=False)).eval()
    bank = attach(model)
    adapter = bank.add("a", LoRA(r=1, lora_alpha=1, lora_dropout=0.25, target_modules="0"))
    with torch.no_grad():
        adapter.tensors["0"]["lora_A"].fill_(1.0)
        adapter.tensors["0"]["lora_B"].fill_(1.0)
        model[0].weight.zero_()
    x = torch.ones(50, 400)
    with bank.use("a"):
        assert torch.equal(model(x), torch.full((50, 1), 400.0))
    with bank.use("a", training=True):
        first, second = model(x), model(x)
    assert not torch.equal(first, second)
    kept = torch.cat([first, second]).detach() * 0.75 / 400
    assert abs(float(kept.mean()) - 0.75) < 0.01
    with bank.use("a", training=False):
        model.train()
        assert torch.equal(model(x), torch.full((50, 1), 400.0))
    assert adapter.draws == 2
    assert F.mse_loss(first, torch.full((50, 1), 400.0)) > 1


def test_the_mask_is_a_function_of_seed_and_pass() -> None:
    """A second adapter in the batch, another batch before, or a copy of the adapter: the mask depends on (seed, pass, site) alone."""

    def run(*others: Adapter, passes: int) -> Tensor:
        torch.manual_seed(len(others))
        model = nn.Sequential(nn.Linear(8, 8))
        nn.init.ones_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        bank = attach(model)
        method = LoRA(r=2, lora_dropout=0.5, target_modules="0")
        nudge(bank.add("a", method, seed=4))
        bank["a"].draws = passes
        for other in others:
            bank.insert(other)
        x = torch.linspace(-1, 1, 16).view(2, 8).repeat(1 + len(others), 1)
        names = ["a", "a", *(name for other in others for name in (other.name,) * 2)]
        with bank.use(names, training=True):
            out: Tensor = model(x)[:2]
        return out

    donor = attach(nn.Sequential(nn.Linear(8, 8)))
    other = nudge(donor.add("b", LoRA(r=3, lora_dropout=0.2, target_modules="0"), seed=8))
    alone = run(passes=5)
    assert torch.equal(alone, run(passes=5))
    assert torch.equal(alone, run(other, passes=5))
    assert not torch.equal(alone, run(passes=6))
