"""Flat batches: every segment comes out as it would alone, in values and gradients, on every architecture."""

from __future__ import annotations

import functools
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tests.tiny import VOCAB, tiny
from torch.utils.checkpoint import checkpoint

from veneer.errors import BaseModelError
from veneer.kernels.attention.segments import Segments
from veneer.models.flat import Flat, FlatRunner
from veneer.models.flat_attention import NAME, Switch
from veneer.models.load import load_base

FLAT = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "qwen2_moe",
    "mixtral",
    "gpt2",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "modernbert",
)
PADDED = ("bloom", "falcon", "mamba", "deberta_v2")
LENGTHS = (13, 1, 21, 13, 6)


def _segments(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _alone(model: Any, segment: list[int]) -> torch.Tensor:
    ids = torch.tensor([segment])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _weights(count: int) -> torch.Tensor:
    """A fixed direction in logits space, so that a weighted loss has a gradient everywhere."""
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _padded_loss(model: Any, segments: list[list[int]]) -> torch.Tensor:
    """The same loss by the model's ordinary call on right-padded rows."""
    width = max(map(len, segments))
    ids = torch.tensor([segment + [5] * (width - len(segment)) for segment in segments])
    mask = torch.tensor([[1] * len(segment) + [0] * (width - len(segment)) for segment in segments])
    logits = model(input_ids=ids, attention_mask=mask).logits
    kept = torch.cat([logits[row, : len(segment)] for row, segment in enumerate(segments)])
    return (kept * _weights(len(kept)).to(kept.dtype)).sum()


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Relative L2 error per tensor; a gradient that is zero but for rounding is measured against the largest one."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no model narrow float64 to float32 on its way (many norms and softmaxes do), so that bounds can be strict."""
    to, narrow, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def keep_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        narrows = self.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return self if narrows else to(self, *args, **kwargs)

    def keep_softmax(x: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))
    monkeypatch.setattr(torch.nn.functional, "softmax", keep_softmax)


def _tiny(arch: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model whose experts, if it has any, take float64 too."""
    experts = {"experts_implementation": "eager"} if arch in ("qwen2_moe", "mixtral") else {}
    return tiny(arch, dtype=dtype, **experts)


@pytest.mark.parametrize("arch", FLAT + PADDED)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_every_segment_and_every_gradient_is_as_alone(arch: str, dtype: torch.dtype, bound: float, wide: None) -> None:
    """Logits equal those of each segment alone, and gradients those of the model's ordinary padded batch."""
    model = _tiny(arch, dtype)
    runner = FlatRunner(model)
    assert runner.kind == ("flat" if arch in FLAT else "padded"), runner.reason
    assert bool(runner.reason) == (arch in PADDED)
    segments = _segments()
    logits = runner.logits(Flat.of(segments))
    for found, segment in zip(logits.split(LENGTHS), segments, strict=True):
        assert _relative(found, _alone(model, segment)) <= bound
    found = _gradients(model, (logits * _weights(len(logits)).to(dtype)).sum())
    _assert_same(found, _gradients(model, _padded_loss(model, segments)), bound)


@pytest.mark.parametrize("arch", FLAT + PADDED)
def test_order_and_grouping_of_segments_do_not_matter(arch: str, wide: None) -> None:
    """The same segments in another order, or in two batches, give the same logits and the same summed gradient."""
    model = _tiny(arch)
    runner = FlatRunner(model)
    segments = _segments()
    weights = _weights(sum(LENGTHS)).split(LENGTHS)

    def loss(order: list[int]) -> torch.Tensor:
        logits = runner.logits(Flat.of([segments[i] for i in order]))
        return (logits * torch.cat([weights[i] for i in order])).sum()

    reference = _gradients(model, loss([0, 1, 2, 3, 4]))
    _assert_same(_gradients(model, loss([3, 2, 4, 0, 1])), reference, 1e-10)
    _assert_same(_gradients(model, loss([4, 1]) + loss([0, 2, 3])), reference, 1e-10)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "bert", "bloom"])
def test_a_nan_stays_in_its_segment(arch: str) -> None:
    """One token with a NaN embedding spoils its own segment; the others keep their exact values."""
    model = tiny(arch, tie_word_embeddings=False)
    runner = FlatRunner(model)
    segments = _segments()
    poison = 7
    segments = [[token if token != poison else poison + 1 for token in segment] for segment in segments]
    clean = runner.logits(Flat.of(segments)).split(LENGTHS)
    segments[2][4] = poison
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    spoilt = runner.logits(Flat.of(segments)).split(LENGTHS)
    assert torch.isnan(spoilt[2]).any()
    for s in (0, 1, 3, 4):
        assert torch.equal(spoilt[s], clean[s])


@pytest.mark.parametrize("arch", ["llama", "gemma3", "roberta", "opt", "bert"])
def test_a_batch_may_be_longer_than_the_models_positions(arch: str) -> None:
    """Positions count inside a segment, so the sum of lengths has no limit."""
    model = tiny(arch)
    segments = _segments((200, 190))
    logits = FlatRunner(model).logits(Flat.of(segments))
    assert _relative(logits[200:], _alone(model, segments[1])) <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "bloom", "falcon"])
def test_kept_logits_are_rows_of_all_logits_in_the_order_asked_for(arch: str) -> None:
    """``keep`` picks flat tokens: any order, repeats, or none."""
    runner = FlatRunner(tiny(arch))
    flat = Flat.of(_segments())
    everything = runner.logits(flat)
    keep = torch.tensor([53, 2, 2, 17, 0, 30])
    assert torch.allclose(runner.logits(flat, keep), everything[keep], atol=1e-5)
    assert runner.logits(flat, keep[:0]).shape == (0, VOCAB)


@pytest.mark.parametrize("arch", ["llama", "bert", "bloom"])
def test_the_cells_that_the_head_is_given_are_told(arch: str) -> None:
    """What reaches the output layer is the hidden states of those cells, in that order."""
    model = tiny(arch)
    runner = FlatRunner(model)
    flat, keep = Flat.of(_segments()), torch.tensor([2, 17, 30, 3])
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    runner.logits(flat)
    runner.logits(flat, keep)
    handle.remove()
    every, kept = (states.flatten(0, 1) for states in seen)
    if arch != "bert":
        assert len(runner.head_cells(flat, keep)) < len(every)
    assert torch.allclose(kept, every[runner.head_cells(flat, keep)], atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "opt", "phi3", "bloom", "mamba", "bert"])
def test_head_is_given_where_logits_are_one_product_of_the_hidden_states(arch: str) -> None:
    """hidden @ weight.T + bias is the model's logits, token by token; BERT's hidden states are those behind its head's transform."""
    runner = FlatRunner(tiny(arch))
    flat = Flat.of(_segments())
    head = runner.head()
    assert head is not None
    found = torch.nn.functional.linear(runner.hidden(flat), *head)
    assert _relative(found, runner.logits(flat)) <= 1e-5


@pytest.mark.parametrize("arch", ["gemma2", "granite", "llama_classifier"])
def test_no_head_is_given_where_more_than_a_product_lies_behind(arch: str) -> None:
    """Soft caps, scaled logits, or no logits per token."""
    assert FlatRunner(tiny(arch)).head() is None


def test_classifier_has_hidden_states_and_logits_of_segments() -> None:
    """A model whose logits are per sequence runs flat for its states, and its head reads each segment as it would alone."""
    model = tiny("llama_classifier").eval()
    runner = FlatRunner(model)
    segments = _segments()
    assert runner.hidden(Flat.of(segments)).shape == (sum(LENGTHS), 32)
    with torch.no_grad():
        logits = runner.logits(Flat.of(segments))
        alone = torch.stack([_alone(model, segment) for segment in segments])
    torch.testing.assert_close(logits, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_layout_says_where_each_token_stands(arch: str) -> None:
    """``index`` and ``cell`` are inverse, and padding is -1."""
    flat = Flat.of(_segments())
    layout = FlatRunner(tiny(arch)).prepare(flat).layout
    total = sum(LENGTHS)
    assert layout.shape == ((1, total) if arch == "llama" else (len(LENGTHS), max(LENGTHS)))
    assert torch.equal(layout.index[layout.cell], torch.arange(total))
    assert int((layout.index == -1).sum()) == layout.shape[0] * layout.shape[1] - total
    rows = layout.index.view(layout.shape)
    if arch == "bloom":
        assert rows[1].tolist() == [13] + [-1] * 20


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "modernbert", "bloom"])
def test_gradients_survive_activation_checkpointing(arch: str, reentrant: bool, wide: None) -> None:
    """Layers that run again in backward, after both batches' forwards have ended, see their own batch's segments."""
    model = tiny(arch, dtype=torch.float64)
    runner = FlatRunner(model)
    batches = [Flat.of(_segments(seed=0)), Flat.of(_segments((4, 30, 9), seed=1))]
    model.train()

    def loss() -> torch.Tensor:
        outs = [runner.logits(batch) for batch in batches]
        return sum((out * _weights(len(out))).sum() for out in outs)

    expected = _gradients(model, loss())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    _assert_same(_gradients(model, loss()), expected, 1e-10)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert all(one is other for one, other in zip(functions, after, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_layers_checkpointed_by_hand_fail_rather_than_compute_something_else(arch: str, reentrant: bool) -> None:
    """Wrapped unknown to the model, whatever its ordinary attention is: backward ends in one sentence with the remedy."""
    model = tiny(arch)
    runner = FlatRunner(model)
    for layer in model.model.layers:

        def wrapped(x: torch.Tensor, forward: Any = layer.forward, **kwargs: Any) -> torch.Tensor:
            return checkpoint(functools.partial(forward, **kwargs), x, use_reentrant=reentrant)

        layer.forward = wrapped
    loss = runner.logits(Flat.of(_segments())).sum()
    with pytest.raises(BaseModelError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_attention_dropout_is_applied_in_training_mode_only() -> None:
    """A base in training mode drops attention weights as it does in an ordinary call; in eval mode it does not."""
    model = tiny("llama", attention_dropout=0.5)
    runner = FlatRunner(model)
    flat = Flat.of(_segments())
    still = runner.logits(flat)
    assert torch.equal(still, runner.logits(flat))
    model.train()
    torch.manual_seed(0)
    first, second = runner.logits(flat), runner.logits(flat)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_model_is_as_before_outside_a_flat_call(arch: str) -> None:
    """Ordinary calls give the same bits, the config the same names and modules the same hooks, also after an error."""
    model = tiny(arch)
    ids = torch.tensor(_segments((12, 12)))
    before, name = model(input_ids=ids).logits, model.config._attn_implementation
    runner = FlatRunner(model)
    runner.logits(Flat.of(_segments()))
    with pytest.raises(IndexError):
        runner.logits(Flat.of([[1, 2, VOCAB + 5]]))
    assert model.config._attn_implementation == name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_an_ordinary_call_in_another_thread_is_undisturbed_by_a_flat_one(arch: str) -> None:
    """While a flat call is inside a layer, another thread's ordinary call and another flat call are both right."""
    model = tiny(arch)
    runner = FlatRunner(model)
    flat, other = Flat.of(_segments()), Flat.of(_segments((3, 8), seed=5))
    ids = torch.tensor(_segments((12, 12)))
    expected = (runner.logits(flat), model(input_ids=ids).logits, runner.logits(other))
    inside, done, found = threading.Event(), threading.Event(), {}
    layer = next(module for name, module in model.named_modules() if name.endswith(".0"))
    main = threading.get_ident()

    def wait(*_: Any) -> None:
        if threading.get_ident() == main:
            inside.set()
            assert done.wait(20)

    def ordinary() -> None:
        assert inside.wait(20)
        try:
            found["ordinary"] = model(input_ids=ids).logits
            found["flat"] = runner.logits(other)
        finally:
            done.set()

    handle = layer.register_forward_pre_hook(wait)
    thread = threading.Thread(target=ordinary)
    thread.start()
    here = runner.logits(flat)
    thread.join()
    handle.remove()
    assert torch.equal(here, expected[0])
    assert torch.equal(found["ordinary"], expected[1])
    assert torch.equal(found["flat"], expected[2])


def test_two_runners_of_one_model_may_run_at_once() -> None:
    """The model is as before when the last one ends, whichever it is, and the checkpointing function too."""
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    config, module = model.config, model.model.layers[0]
    name, function = config._attn_implementation, module._gradient_checkpointing_func
    segments = Segments(torch.tensor([0, 2]))
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(Switch(model).flat(segments))
        second.enter_context(Switch(model).flat(segments))
        first.close()
        assert config._attn_implementation == NAME and module._gradient_checkpointing_func is not function
    assert config._attn_implementation == name and module._gradient_checkpointing_func is function


def test_probe_keeps_each_modules_training_mode() -> None:
    """A model handed over in training mode, one part of it in eval mode, comes back so."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    FlatRunner(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


def test_probe_refuses_a_model_that_mixes_segments_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that adds the mean of all rows to each is right neither flat nor padded, and is refused in one sentence."""
    model = tiny("llama")
    model.model.norm.register_forward_hook(lambda module, args, out: out + out.mean(dim=(0, 1), keepdim=True))
    with pytest.raises(BaseModelError, match="for each text alone"):
        FlatRunner(model)


@pytest.mark.parametrize("arch", ["t5", "vit"])
def test_models_without_a_flat_form_are_refused(arch: str) -> None:
    """Encoder-decoders and models without token ids get one clear sentence."""
    with pytest.raises(BaseModelError, match=r"T5|ViT"):
        FlatRunner(tiny(arch))


def test_rotary_scales_that_follow_the_longest_segment_are_refused_beyond_their_limit() -> None:
    """With dynamic scaling one long segment would change its neighbours; within the limit, or alone, it runs."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    by_layer = {"full_attention": dynamic, "sliding_attention": plain}
    for arch, rope in (("llama", dynamic), ("gemma3", by_layer)):
        runner = FlatRunner(tiny(arch, rope_parameters=rope, max_position_embeddings=32))
        runner.logits(Flat.of(_segments((32, 8))))
        runner.logits(Flat.of(_segments((40,))))
        with pytest.raises(BaseModelError, match="32 tokens"):
            runner.logits(Flat.of(_segments((40, 8))))


def test_offsets_that_do_not_cover_the_batch_are_an_error() -> None:
    """Offsets must end at the number of tokens."""
    flat = Flat.of(_segments())
    with pytest.raises(BaseModelError, match="offsets"):
        FlatRunner(tiny("llama")).logits(Flat(flat.ids, flat.positions, flat.offsets[:-1]))


@pytest.mark.real
def test_gradients_on_the_embedded_model_equal_those_of_padded_rows() -> None:
    """On SmolLM2-135M in float32, within 3e-5 per tensor, by hidden states and its own head."""
    base = load_base("smollm2-135m", dtype="float32")
    names = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.14.mlp.down_proj.weight",
        "model.layers.29.self_attn.v_proj.weight",
    )
    parameters = [base.model.get_parameter(name).requires_grad_() for name in names]
    runner = FlatRunner(base.model)
    assert runner.kind == "flat" and runner.head() is not None
    texts = (
        "The sea is calm today.",
        "def area(w, h):\n    return w * h\n" * 6,
        "Yes.",
        "One, two, three, four, five. " * 9,
    )
    segments = [base.tokenizer(text)["input_ids"] for text in texts]
    targets = torch.cat([torch.tensor([*segment[1:], -100]) for segment in segments])
    loss = torch.nn.functional.cross_entropy(runner.logits(Flat.of(segments)), targets)
    found = torch.autograd.grad(loss, parameters)
    width = max(map(len, segments))
    ids = torch.tensor([segment + [2] * (width - len(segment)) for segment in segments])
    mask = torch.tensor([[1] * len(segment) + [0] * (width - len(segment)) for segment in segments])
    rows = base.model(input_ids=ids, attention_mask=mask).logits
    kept = torch.cat([rows[row, : len(segment)] for row, segment in enumerate(segments)])
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(kept, targets), parameters)
    for one, other in zip(found, expected, strict=True):
        assert _relative(one, other) <= 3e-5
