"""Models that reshape on the way, read weights past a layer's call, share or reuse layers: the right result or our error, never the
base's output and never a route that has moved to another row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters.made import bits, merged_model, nudge, portrait
from tests.adapters.peers import inputs_of
from tests.tiny import ARCHS, tiny
from torch import Tensor, nn

from veneer.adapters import Bank, DoRA, LoRA, Route, attach
from veneer.errors import RouteError, TargetError, VeneerError

ROWS: list[Any] = ["a", None, {"a": 0.5, "b": 0.5}, "b"]


def banked(model: nn.Module, example: dict[str, Any] | None = None, **options: Any) -> Bank:
    bank = attach(model, example=example)
    nudge(bank.add("a", LoRA(r=3, lora_alpha=6, **options), seed=1), by=0.1, seed=1)
    nudge(bank.add("b", DoRA(r=2, lora_alpha=4, **options), seed=2), by=0.1, seed=2)
    return bank


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch)
    return out if isinstance(out, Tensor) else out.logits


def check_rows(
    model: Any, bank: Bank, batch: dict[str, Tensor], rows: list[Any] = ROWS, *, limit: float = 2e-4
) -> None:
    """Every row is as in a batch that is routed its way altogether and as through merged weights; base rows keep their bits; the
    adapters do change something; a token route says the same where tokens are what the model sees. Where a router gathers the tokens
    of all rows expert by expert, how many stand beside a base row's depends on the other rows, and so does the matrix product's
    rounding: there base rows agree to 1e-6."""
    base = run(model, batch)
    exact = getattr(model.config, "num_experts", None) is None if hasattr(model, "config") else True
    with bank.use(rows):
        mixed = run(model, batch)
    for i, route in enumerate(rows):
        with bank.use(route):
            whole = run(model, batch)
        merged = run(merged_model(bank, route), batch)
        assert (whole - merged).abs().max() <= limit
        assert (mixed[i] - whole[i]).abs().max() <= limit
        if route is None:
            assert torch.equal(bits(mixed[i]), bits(base[i])) if exact else (mixed[i] - base[i]).abs().max() <= 1e-6
        else:
            assert (mixed[i] - base[i]).abs().max() > 20 * limit


MIXED = [arch for arch in ARCHS if arch not in ("deberta_v2", "bloom")]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_follows_mixed_rows_or_refuses(arch: str) -> None:
    """All architectures with adapters on all linear layers: rows come out right; only DeBERTa, which projects a constant, refuses, and
    does what it is asked without that layer."""
    model: Any = tiny(arch)
    batch = inputs_of(model, rows=4)
    bank = banked(model)
    if arch != "deberta_v2":
        check_rows(model, bank, batch)
        return
    with pytest.raises(RouteError, match=r"pos_key_proj.*1 x 32.*4 rows.*leave this site out"), bank.use(ROWS):
        run(model, batch)
    for route in ("a", "b", {"a": 0.5, "b": 0.5}):
        with bank.use(route):
            assert (run(model, batch) - run(merged_model(bank, route), batch)).abs().max() <= 2e-4
    bank.detach()
    check_rows(model, banked(model, exclude_modules=("pos_key_proj", "pos_query_proj")), batch)


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("opt", ("fc1", "fc2", "embed_tokens")),
        ("mamba", ("in_proj", "x_proj", "out_proj", "embeddings")),
        ("t5", ("wi", "wo", "k", "lm_head")),
        ("t5", ("encoder.embed_tokens", "decoder.embed_tokens", "o")),
        ("bert", ("word_embeddings", "token_type_embeddings", "transform.dense")),
        ("bert_classifier", ("pooler.dense", "classifier", "query")),
        ("llama_classifier", ("score", "q_proj")),
        ("vit", ("projection", "classifier", "fc1")),
        ("qwen2_moe", ("shared_expert_gate", "shared_expert.up_proj")),
        ("modernbert", ("tok_embeddings", "Wqkv", "decoder")),
        ("gpt2", ("wte", "lm_head")),
        ("gemma3", ("embed_tokens", "lm_head")),
        ("falcon", ("word_embeddings", "query_key_value")),
    ],
)
def test_layers_outside_of_the_blocks(arch: str, targets: tuple[str, ...]) -> None:
    """Embeddings, heads, poolers, routers' gates and patches take routes row by row as well."""
    model: Any = tiny(arch)
    check_rows(model, banked(model, target_modules=targets), inputs_of(model, rows=4))


@pytest.mark.parametrize(
    ("arch", "target"), [("gpt2", "wpe"), ("bert", "position_embeddings"), ("deberta_v2", "pos_query_proj")]
)
def test_constants_cannot_be_routed_by_rows(arch: str, target: str) -> None:
    """A layer that sees positions and no rows takes one route for all, and is an error with more than one; rows that leave it alone
    do not mind that another adapter is there."""
    model: Any = tiny(arch)
    batch = inputs_of(model, rows=2)
    bank = banked(model, target_modules=target)
    with bank.use("a"):
        assert (run(model, batch) - run(merged_model(bank, "a"), batch)).abs().max() <= 2e-4
    for route in (["a", None], Route.tokens(["a", None], torch.arange(14) % 2)):
        with pytest.raises(RouteError, match=f"{target}.*cannot be matched"), bank.use(route):
            run(model, batch)
    for seed, name in enumerate(("elsewhere", "besides")):
        nudge(
            bank.add(name, LoRA(r=2, target_modules=("attention.*.dense" if arch != "gpt2" else "c_attn"))), seed=seed
        )
    check_rows(model, bank, batch, ["elsewhere", "besides"])


def test_a_batch_of_as_many_rows_as_tokens() -> None:
    """Where both sizes agree nothing gets mixed up."""
    for arch in ("opt", "bert", "llama"):
        model: Any = tiny(arch)
        check_rows(model, banked(model), inputs_of(model, rows=4, tokens=4))


class SequenceFirst(nn.Module):
    """Takes [B, T] and works on [T, B, D], as recurrent models and older transformers do; ``flat`` merges the first two."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(50, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.flat = flat

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        shape = x.shape
        x = self.layer(x.reshape(-1, 6) if self.flat else x).reshape(shape)
        out: Tensor = self.head(x.transpose(0, 1))
        return out


class Windows(nn.Module):
    """Cuts every row into windows [B * n, m, D], as vision models do; with ``inner`` False the windows stand first."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(50, 6), nn.Linear(6, 6)
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, d = x.shape
        cut = x.view(b, t // 2, 2, d)
        cut = cut if self.inner else cut.transpose(0, 1)
        out = self.layer(cut.reshape(-1, 2, d)).view(cut.shape)
        return (out if self.inner else out.transpose(0, 1)).reshape(b, t, d)


@pytest.mark.parametrize("shape", [(4, 6), (4, 4), (2, 4)])
@pytest.mark.parametrize("known", [False, True], ids=["unprobed", "example"])
@pytest.mark.parametrize(
    ("make", "right"),
    [
        pytest.param(lambda: SequenceFirst(False), False, id="tokens-first"),
        pytest.param(lambda: SequenceFirst(True), False, id="tokens-first-in-one-line"),
        pytest.param(lambda: Windows(True), True, id="windows-in-rows"),
        pytest.param(lambda: Windows(False), False, id="rows-in-windows"),
    ],
)
def test_orders_that_sizes_cannot_tell(make: Any, right: bool, known: bool, shape: tuple[int, int]) -> None:
    """Whether rows lie behind each other is seen in what the layer is given, not in its sizes, which may agree by accident: those that
    do are right, the others are refused for rows and tokens alike, also where B = T."""
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(1, 50, shape)
    example = {"ids": torch.randint(1, 50, (3, 4))} if known else None
    bank = banked(model, example, target_modules="layer")
    rows = ROWS[: shape[0]]
    if right:
        check_rows(model, bank, {"ids": ids}, rows, limit=1e-5)
        return
    tokens = Route.tokens(["a", None], torch.arange(ids.numel()).view(shape) % 2)
    for route in (rows, tokens):
        with pytest.raises(RouteError, match="cannot be matched"), bank.use(route):
            model(ids)
    with bank.use("a"):
        assert torch.allclose(model(ids), merged_model(bank, "a")(ids), atol=1e-5)


def test_what_a_short_batch_cannot_show_is_not_taken_as_shown() -> None:
    """One token a row looks the same in either order; a longer batch afterwards is not routed by what that seemed to show."""
    torch.manual_seed(0)
    for flat in (True, False):
        model = SequenceFirst(flat)
        bank = banked(model, target_modules="layer")
        for tokens in (1, 5):
            ids = torch.randint(1, 50, (4, tokens))
            try:
                with bank.use(ROWS):
                    found = model(ids)
            except RouteError:
                continue
            for row, route in enumerate(ROWS):
                assert torch.allclose(found[row], merged_model(bank, route)(ids)[row], atol=1e-5)


class Reader(nn.Module):
    """A layer that is called, and one whose weight is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class Attending(nn.Module):
    """torch's own attention, which reads the weight of its out_proj past the layer's call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.attention(x, x, x, need_weights=False)[0])
        return out


@pytest.mark.parametrize(("make", "silent"), [(Reader, "read"), (Attending, "attention.out_proj")])
@pytest.mark.parametrize("training", [False, True])
def test_layers_that_are_never_called_are_found_in_the_first_run(make: Any, silent: str, training: bool) -> None:
    """Without a probe an adapter on such a layer is an error after the first call, alone or beside others, for each adapter anew."""
    model = make().train(training)
    x = torch.randn(2, 3, 4)
    bank = attach(model)
    bank.add("all", LoRA(r=2))
    bank.add("it", LoRA(r=2, target_modules=silent))
    bank.add("fine", LoRA(r=2, exclude_modules=silent))
    assert (silent in bank["all"].tensors) and (silent in bank["it"].tensors)
    with bank.use("fine"):
        model(x)
    for name in ("all", "it"):
        with (
            pytest.raises(TargetError, match=f'without calling {silent}, so adapter "{name}" did nothing there'),
            bank.use(name),
        ):
            model(x)
    with pytest.raises(TargetError, match=r"cannot be adapted.*was not called"):
        attach(make(), example={"x": x}).add("a", LoRA(r=2, target_modules=silent))
    assert silent not in attach(make(), example={"x": x}).add("a", LoRA(r=2)).tensors


def test_a_shorter_way_in_training_is_found() -> None:
    """A model that calls a layer in eval and passes it by in training, as fused kernels do, is an error once that is sure; a layer that
    is dropped now and then is none."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.sometimes = (nn.Linear(4, 4) for _ in range(3))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.first(x)
            if self.calls % 5:
                x = self.sometimes(x)
            return F.linear(x, self.second.weight) if self.training else self.second(x)

    def steps(model: nn.Module, **options: Any) -> int:
        x = torch.randn(2, 4)
        bank = attach(model, example={"x": x})
        bank.add("a", LoRA(r=2, **options))
        model.train()
        for step in range(40):
            with bank.use("a"):
                try:
                    model(x).sum().backward()
                except TargetError as error:
                    assert "without calling second," in str(error)  # noqa: PT017
                    return step
        return 40

    assert steps(Fickle()) == 31
    assert steps(Fickle(), exclude_modules="second") == 40


def test_a_weight_that_two_layers_share() -> None:
    """An adapter on one of two layers that share a weight changes that one; merging says that they come apart."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(torch.tanh(self.one(x)))
            return out

    torch.manual_seed(0)
    model, x = Shared(), torch.randn(4, 4)
    bank = banked(model, target_modules="one")
    assert bank.unties("a") == [("one", "two")] and bank.unties(None) == []
    check_rows(model, bank, {"x": x}, limit=1e-5)
    nudge(bank.add("both", LoRA(r=2, target_modules=("one", "two")), seed=3))
    assert not torch.equal(bank["both"].tensors["one"]["lora_B"], bank["both"].tensors["two"]["lora_B"])
    check_rows(model, bank, {"x": x}, ["both", "a", None, "both"], limit=1e-5)


def test_a_layer_under_two_names_and_called_twice() -> None:
    """One module in two places is one site, acts at both, and is merged under both names."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.again(torch.tanh(self.first(x)))
            return out

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3, 4)
    bank = banked(model)
    assert list(bank["a"].tensors) == ["first"] and bank.sites["first"].names == ("first", "again")
    merged = bank.merged_state_dict("a")
    assert torch.equal(merged["first.weight"], merged["again.weight"])
    plain = Twice()
    plain.load_state_dict(merged)
    with bank.use("a"), torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-6)
    check_rows(model, bank, {"x": x}, limit=1e-5)


def test_batch_statistics_and_random_state_are_left_alone() -> None:
    """Attaching tries a model out without moving a buffer, the mode or the random state, and so does the first route row by row."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2)
            self.frozen_norm = nn.BatchNorm2d(2).eval()
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(2, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            x = self.frozen_norm(self.drop(self.norm(self.conv(x))))
            x = x + 0.01 * torch.randn(())
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    for example in (None, {"x": torch.randn(3, 1, 4, 4)}):
        model = Noisy().train()
        model.frozen_norm.eval()
        torch.manual_seed(5)
        before, random = portrait(model), torch.get_rng_state()
        bank = attach(model, example=example)
        assert portrait(model) == before and torch.equal(torch.get_rng_state(), random)
        bank.add("a", LoRA(r=2, target_modules=("conv", "head")))
        x = torch.randn(4, 1, 4, 4)
        reference = copy.deepcopy(model)
        torch.manual_seed(6)
        with bank.use(["a", None, "a", None]):
            found = model(x)
        torch.manual_seed(6)
        assert torch.equal(found, reference(x))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), reference.buffers(), strict=True))


def test_an_example_that_does_not_fit_is_told() -> None:
    """A model that cannot be called with example= says so at once."""
    with pytest.raises(VeneerError, match="cannot be called with example=: RuntimeError"):
        attach(Reader(), example={"x": torch.randn(2, 3)})


def test_an_example_of_one_row_leaves_rows_unknown() -> None:
    """One row shows which layers are called but not how rows lie: the first batch with rows shows that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    bank = banked(model, {"input": torch.randn(1, 4)})
    assert {site.layout for site in bank.sites.values()} == {""}
    check_rows(model, bank, {"input": torch.randn(4, 4)}, limit=1e-5)
    assert {site.layout for site in bank.sites.values()} == {"rows"}


class Opaque:
    """An argument that a second call might change."""

    def __init__(self) -> None:
        self.calls = 0


def test_rows_that_cannot_be_found_out_are_refused() -> None:
    """A model that takes more than tensors is not called twice on a guess; with one route for all it simply runs."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, state: Opaque) -> Tensor:
            state.calls += 1
            out: Tensor = self.layer(x)
            return out

    model, state = Counting(), Opaque()
    bank = banked(model)
    with pytest.raises(RouteError, match=r"not known.*attach\(model, example=\.\.\.\)"), bank.use(["a", None]):
        model(torch.randn(2, 4), state)
    with bank.use("a"):
        model(torch.randn(2, 4), state)
    with bank.use(["a"]):
        model(torch.randn(1, 4), state)
    assert state.calls == 3


def test_a_module_that_was_replaced_is_noticed() -> None:
    """A layer that is another one than when the bank was attached, or has another shape, is an error instead of the base's output."""
    model: Any = tiny("llama")
    bank = banked(model, target_modules=("embed_tokens", "q_proj"))
    model.resize_token_embeddings(330)
    with pytest.raises(VeneerError, match=r"embed_tokens: the model has another layer"), bank.use("a"):
        run(model, inputs_of(model))
    model.resize_token_embeddings(320)
    with bank.use("a"):
        run(model, inputs_of(model))
    model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(VeneerError, match=r"1.self_attn.q_proj: the model has another layer"), bank.use("a"):
        run(model, inputs_of(model))


def test_another_hook_on_the_forward_is_not_torn_off() -> None:
    """Where another library replaced a layer's forward after us, taking the adapter off is refused until that is undone; a forward that
    was there before us is called and comes back."""
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    own = model[0].forward

    def before(x: Tensor) -> Tensor:
        calls.append("before")
        out: Tensor = own(x)
        return out

    model[0].forward = before
    bank = banked(model, target_modules="0")
    ours = model[0].forward
    model[0].forward = lambda x: ours(x)
    for act in (lambda: bank.remove("a"), bank.detach, lambda: bank.add("c", LoRA(r=1))):
        with pytest.raises(VeneerError, match="forward of 0 was replaced"):
            act()
    assert bank.names == ["a", "b"]
    model[0].forward = ours
    with bank.use("a"):
        model(torch.randn(2, 4))
    bank.detach()
    assert model[0].forward is before and calls == ["before"]


def test_experts_in_the_model_itself() -> None:
    """Experts that the model calls with the tokens which a router picks: rows of two adapters, and a batch that leaves experts out."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 4)
            best = self.gate(flat).argmax(-1)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                at = (best == number).nonzero().squeeze(1)
                if len(at):
                    out = out.index_copy(0, at, expert(flat[at]))
            return out.view(x.shape)

    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(3, 3, 4)
    bank = banked(model, target_modules="re:experts.*")
    with bank.use("a"):
        model(x[:1, :1])
        assert torch.allclose(model(x), merged_model(bank, "a")(x), atol=1e-6)
    with bank.use(["a", None, "b"]):
        mixed = model(x)
    for row, route in enumerate(["a", None, "b"]):
        assert torch.allclose(mixed[row], merged_model(bank, route)(x)[row], atol=1e-6)


def test_a_batch_inside_a_mapping() -> None:
    """Models that take one dictionary or list of tensors are routed by the rows inside it."""

    class OneArgument(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
            x = batch["x"][0]
            out: Tensor = self.layer(x.reshape(-1, 4)).view(x.shape)
            return out

    torch.manual_seed(0)
    model = OneArgument()
    check_rows(model, banked(model), {"batch": {"x": [torch.randn(4, 3, 4)]}}, limit=1e-5)  # type: ignore[dict-item]
