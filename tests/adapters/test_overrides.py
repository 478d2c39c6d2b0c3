"""Values of an adapter's own: heads, embeddings, norms, biases and token rows, for its cells only."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.tiny import tiny
from torch import Tensor, nn

import veneer
from veneer import DoRA, LoRA
from veneer.adapters import Adapter
from veneer.errors import AdapterError, TargetError

IDS = torch.arange(5, 26).reshape(3, 7)
OPTIONS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "both tied": {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
    "layer": {"modules_to_save": ("layers.1.mlp",)},
    "tokens": {"trainable_token_indices": (6, 9, 7)},
    "all": {"modules_to_save": ("lm_head", "norm"), "trainable_token_indices": (8,)},
}
BIASES: dict[str, dict[str, Any]] = {
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
}
CASES = [("llama", name, options) for name, options in OPTIONS.items()] + [
    ("opt", name, options) for name, options in BIASES.items()
]
IDENTIFIERS = [f"{arch}-{name}" for arch, name, _ in CASES]


def stir(adapter: Adapter, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.data.add_(by * torch.randn(parameter.shape, generator=generator))


def made(arch: str, options: dict[str, Any], cls: Any = LoRA) -> Any:
    """A bank on a tied model with a trained adapter "a" and a plain one, "b"."""
    bank = veneer.attach(tiny(arch, tie_word_embeddings=True))
    bank.add("a", cls(r=2, target_modules=("q_proj", "fc1") if arch == "opt" else ("q_proj", "up_proj"), **options))
    bank.add("b", LoRA(r=3, target_modules=("v_proj",)), seed=1)
    return bank


@torch.no_grad()
def logits(bank: Any, route: Any, ids: Tensor = IDS) -> Tensor:
    with bank.use(route):
        found: Tensor = bank.model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(("arch", "name", "options"), CASES, ids=IDENTIFIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_is_the_base_to_the_bit(
    arch: str, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Own values start as the base's; removing and detaching leave no trace."""
    base = tiny(arch, tie_word_embeddings=True).to(dtype)
    expected = base(input_ids=IDS).logits
    state = {key: value.clone() for key, value in base.state_dict().items()}
    bank = veneer.attach(base)
    adapter = bank.add("a", LoRA(r=2, target_modules=("q_proj",), **options))
    assert adapter.overrides
    if name != "tokens" and name != "all":
        assert torch.equal(logits(bank, "a"), expected)
    else:  # a head's rows are a product of their own, of another shape than the base's
        assert torch.allclose(
            logits(bank, "a").float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 1e-1
        )
    bank.remove("a")
    assert torch.equal(base(input_ids=IDS).logits, expected)
    bank.detach()
    assert all("forward" not in module.__dict__ for module in base.modules())
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize(("arch", "name", "options"), CASES, ids=IDENTIFIERS)
def test_rows_beside_others_answer_as_alone(arch: str, name: str, options: dict[str, Any]) -> None:
    """In a mixed batch each row has its own adapter's values, base rows the base's, and neither changes the other."""
    bank = made(arch, options)
    plain = logits(bank, None)
    for adapter in ("a", "b"):
        stir(bank[adapter])
    alone = [logits(bank, "a"), plain, logits(bank, "b")]
    mixed = logits(bank, ["a", None, "b"])
    assert (alone[0] - plain).abs().max() > 1e-2
    for row, expected in enumerate(alone):
        assert torch.allclose(mixed[row], expected[row], atol=2e-6)
    assert torch.equal(logits(bank, None), plain)


@pytest.mark.parametrize(("arch", "name", "options"), CASES, ids=IDENTIFIERS)
@pytest.mark.parametrize("route", ["a", {"a": 0.6, "b": 0.5}], ids=["alone", "mix"])
def test_merging_gives_what_the_layers_compute(arch: str, name: str, options: dict[str, Any], route: Any) -> None:
    """The merged model computes the same, for one adapter and for a weighted mix."""
    bank = made(arch, options)
    for adapter in ("a", "b"):
        stir(bank[adapter])
    expected = logits(bank, route)
    merged = tiny(arch, tie_word_embeddings=False)
    state = bank.merged_state_dict(route)
    state.setdefault("lm_head.weight", bank.model.lm_head.weight)
    merged.load_state_dict(state)
    assert torch.allclose(merged(input_ids=IDS).logits, expected, atol=2e-5)


def test_merging_a_bias_where_the_base_has_none_is_an_error() -> None:
    """Llama's layers have no bias, so one of the adapter's own has no name in the merged model."""
    bank = made("llama", {"lora_bias": True})
    stir(bank["a"])
    with pytest.raises(AdapterError, match=r'the base has no "model\.layers\.0\.self_attn\.q_proj\.bias"'):
        bank.merged_state_dict("a")


def test_which_weights_come_apart_is_told() -> None:
    """A head or an embedding of the adapter's own unties the model; one for both, or the same rows at both, does not."""
    apart = [("lm_head", "model.embed_tokens")]
    for name, expected in (
        ("head", True),
        ("embedding", True),
        ("both tied", False),
        ("tokens", False),
        ("norms", False),
    ):
        found = [tuple(sorted(group)) for group in made("llama", OPTIONS[name]).unties("a")]
        assert found == (apart if expected else [])


@pytest.mark.parametrize(("arch", "name", "options"), CASES, ids=IDENTIFIERS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_everything_of_its_own_learns(arch: str, name: str, options: dict[str, Any], checkpointing: bool) -> None:
    """Every tensor gets a gradient, the base none; training by a plain loop lowers the loss; token rows change and no other does."""
    bank = made(arch, options)
    bank.remove("b")
    model = bank.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(bank.parameters("a"), lr=0.05)
    losses = []
    for _ in range(6):
        with bank.use("a"):
            loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    for site, key, parameter in bank["a"].named_tensors():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (site, key)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_the_weights_themselves() -> None:
    """An embedding, a head and norms of the adapter's own get the gradients that the base's would, were it trained."""
    bank = veneer.attach(tiny("llama", tie_word_embeddings=False))
    bank.add("a", LoRA(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head", "norm")))
    with bank.use("a"):
        bank.model(input_ids=IDS, labels=IDS).loss.backward()
    other = tiny("llama", tie_word_embeddings=False)
    other(input_ids=IDS, labels=IDS).loss.backward()
    for place, own in bank["a"].overrides.items():
        for key, value in own.items():
            expected = other.get_parameter(f"{place}.{key}").grad
            assert value.grad is not None and torch.allclose(value.grad, expected, atol=1e-6)


def test_one_tensor_serves_two_places() -> None:
    """Rows of tokens act where tokens are looked up and where they are predicted, and count and train once."""
    bank = made("llama", OPTIONS["tokens"])
    adapter = bank["a"]
    assert adapter.overrides["model.embed_tokens"]["rows"] is adapter.overrides["lm_head"]["rows"]
    assert [key for _, key, _ in adapter.named_tensors()].count("rows") == 1
    low_rank = sum(value.numel() for own in adapter.tensors.values() for value in own.values())
    assert adapter.num_parameters() == low_rank + 3 * 32
    twin = copy.deepcopy(adapter)
    assert twin.overrides["model.embed_tokens"]["rows"] is twin.overrides["lm_head"]["rows"]


def test_only_their_own_tokens_rows_change() -> None:
    """A row without the trained tokens has the base's hidden states; its logits differ in those tokens' columns only."""
    bank = made("llama", OPTIONS["tokens"])
    bank["a"].overrides["lm_head"]["rows"].data.add_(1.0)
    ids = torch.arange(20, 34).reshape(2, 7)
    before, after = logits(bank, None, ids), logits(bank, "a", ids)
    changed = (before - after).abs().amax((0, 1)).nonzero().flatten().tolist()
    assert changed == [6, 7, 9]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules_to_save": ("lm_heed",)}, 'modules_to_save: "lm_heed" matches nothing'),
        ({"trainable_token_indices": (400,)}, "expected distinct tokens below 320"),
        ({"trainable_token_indices": (4, 4)}, "expected distinct tokens below 320"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(options: dict[str, Any], says: str) -> None:
    """Names that match nothing and tokens that are not there are refused, and the bank stays empty."""
    bank = veneer.attach(tiny("llama"))
    with pytest.raises(TargetError, match=says):
        bank.add("a", LoRA(target_modules=("q_proj",), **options))
    assert bank.names == []


def test_experts_cannot_be_had_whole() -> None:
    """A stacked parameter is not a layer: asking for it whole says so."""
    with pytest.raises(TargetError, match="cannot be trained for one adapter"):
        veneer.attach(tiny("mixtral")).add("a", LoRA(target_modules=("q_proj",), modules_to_save=("mlp",)))


@pytest.mark.parametrize(
    ("own", "tokens", "says"),
    [
        ({"lm_head": {"weight": torch.zeros(3, 3)}}, {}, "expected shape"),
        ({"model.norm": {"bias": torch.zeros(32)}}, {}, "the layer has no bias"),
        ({"nowhere": {"weight": torch.zeros(3)}}, {}, "the base has no layer here"),
        ({"lm_head": {"rows": torch.zeros(2, 32)}}, {"lm_head": (1, 1)}, "expected distinct tokens"),
        ({"lm_head": {"rows": torch.zeros(1, 32)}}, {"lm_head": (320,)}, "expected distinct tokens from 0 to 319"),
        ({"model.layers.0.self_attn.q_proj": {"weight": torch.zeros(32, 32)}}, {}, "cannot both change this weight"),
        (
            {"lm_head": {"weight": torch.zeros(320, 32), "rows": torch.zeros(1, 32)}},
            {"lm_head": (1,)},
            "cannot have both",
        ),
        ({"lm_head": {"lora_bias": torch.zeros(320)}}, {}, "needs a LoRA change at the same site"),
    ],
)
def test_values_that_do_not_fit_are_refused(own: Any, tokens: Any, says: str) -> None:
    """Shapes, places and tokens are held against the base before anything is put there."""
    bank = veneer.attach(tiny("llama"))
    donor = veneer.attach(tiny("llama")).add("a", DoRA(r=2, target_modules=("q_proj",)))
    adapter = Adapter("x", donor.method, donor.tensors, donor.kinds, overrides=own, tokens=tokens)
    with pytest.raises(AdapterError, match=says):
        bank.insert(adapter)
    assert bank.names == [] and all("forward" not in module.__dict__ for module in bank.model.modules())


def test_statistics_over_a_batch_are_no_values_of_one_row() -> None:
    """A batch norm cannot be shared by rows with different adapters."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    bank = veneer.attach(model, example={"input": torch.randn(2, 4)})
    with pytest.raises(TargetError, match="BatchNorm1d, which cannot be trained"):
        bank.add("a", LoRA(target_modules=("0",), modules_to_save=("1",)))


def test_an_attached_model_with_own_values_can_be_copied() -> None:
    """deepcopy and pickling carry own values along."""
    bank = made("llama", OPTIONS["all"])
    stir(bank["a"])
    expected = logits(bank, "a")
    twin = veneer.bank_of(copy.deepcopy(bank.model))
    assert twin is not None and torch.equal(logits(twin, "a"), expected)
    file = io.BytesIO()
    torch.save(bank.model, file)
    file.seek(0)
    again = veneer.bank_of(torch.load(file, weights_only=False))
    assert again is not None and torch.equal(logits(again, "a"), expected)


def test_generation_and_key_value_caches_use_own_values() -> None:
    """Greedy answers with a cache equal those of whole forwards, row by row, each row with its own adapter."""
    bank = made("llama", OPTIONS["all"])
    stir(bank["a"], 0.3)
    with bank.use(["a", None]):
        found = bank.model.generate(input_ids=IDS[:2], max_new_tokens=5, do_sample=False, eos_token_id=None)
    for row, name in enumerate(("a", None)):
        ids = IDS[row : row + 1]
        for _ in range(5):
            ids = torch.cat([ids, logits(bank, name, ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(found[row], ids[0])


def test_an_adapter_without_a_factor_is_refused_by_name() -> None:
    """`insert` names the tensor that is missing."""
    bank = veneer.attach(tiny("llama"))
    donor = veneer.attach(tiny("llama")).add("a", LoRA(r=2))
    tensors = {
        site: {key: value for key, value in own.items() if key != "lora_A"} for site, own in donor.tensors.items()
    }
    with pytest.raises(AdapterError, match="has a tensor lora_A here, which is missing"):
        bank.insert(Adapter("x", donor.method, tensors, donor.kinds))
