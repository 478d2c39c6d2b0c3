"""Routes: every form of them, row by row and token by token, and what must never leak from one row to another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.adapters.made import CASES, bits, merged_model, nudge
from tests.adapters.peers import inputs_of
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import Bank, DoRA, LoRA, Route, attach
from veneer.errors import AdapterError, RouteError

ROWS: list[Any] = ["lora", None, {"lora": 0.7, "dora": -0.4}, "dora", "rs", {"rs": 0.5}, {"lora": 0.0}]


def three(model: nn.Module, **options: Any) -> Bank:
    """A bank with adapters of three methods and ranks, all nudged."""
    bank = attach(model)
    nudge(bank.add("lora", LoRA(r=3, lora_alpha=6, **options), seed=1), by=0.1, seed=1)
    nudge(bank.add("dora", DoRA(r=5, lora_alpha=5, **options), seed=2), by=0.1, seed=2)
    nudge(bank.add("rs", LoRA(r=2, lora_alpha=3, use_rslora=True, **options), seed=3), by=0.1, seed=3)
    return bank


def logits(model: nn.Module, bank: Bank, route: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad(), bank.use(route, **options):
        out: Tensor = model(**batch).logits
    return out


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "opt", "bert", "qwen2_moe", "vit", "modernbert"])
def test_each_row_is_as_if_alone(arch: str, fused: bool) -> None:
    """A row of a mixed batch gets what the same row gets in a batch that is routed its way altogether, and what a model with its
    merged weights gives."""
    # Of the forms that transformers has for experts, one takes fp64.
    own = {"experts_implementation": "eager"} if arch == "qwen2_moe" else {}
    model: Any = tiny(arch, dtype=torch.float64, **own)
    batch = inputs_of(model, rows=len(ROWS))
    bank = three(model)
    bank.fast_path = fused
    mixed = logits(model, bank, ROWS, batch)
    for i, route in enumerate(ROWS):
        alone = logits(model, bank, route, batch)[i]
        assert torch.allclose(mixed[i], alone, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            merged = merged_model(bank, route)(**batch).logits[i]
        assert torch.allclose(mixed[i], merged, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bert"])
def test_base_rows_keep_their_bits(arch: str, dtype: torch.dtype) -> None:
    """Rows that take the base come out as in a batch of base rows, to the bit, in fp32 and bf16, trained or not."""
    model: Any = tiny(arch, dtype=dtype)
    batch = inputs_of(model, rows=6)
    bank = three(model)
    base = logits(model, bank, None, batch)
    mixed = logits(model, bank, ["lora", None, "dora", None, {"lora": 0.5, "rs": 1}, {}], batch)
    for i in (1, 3, 5):
        assert torch.equal(bits(mixed[i]), bits(base[i]))
    for i in (0, 2, 4):
        assert not torch.equal(mixed[i], base[i])


def test_order_and_grouping_do_not_matter() -> None:
    """Rows come out the same wherever they stand and whoever stands beside them."""
    model: Any = tiny("llama", dtype=torch.float64)
    batch = inputs_of(model, rows=len(ROWS))
    bank = three(model)
    mixed = logits(model, bank, ROWS, batch)
    order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    moved = logits(model, bank, [ROWS[i] for i in order], {"input_ids": batch["input_ids"][order]})
    assert torch.allclose(moved, mixed[order], rtol=1e-10, atol=1e-11)
    for part in (slice(0, 3), slice(3, 7)):
        some = logits(model, bank, ROWS[part], {"input_ids": batch["input_ids"][part]})
        assert torch.allclose(some, mixed[part], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_token_routes_that_are_constant_in_a_row_are_row_routes(arch: str, fused: bool) -> None:
    """The same route written token by token, for padded rows [B, T] or as one line, gives the same bits."""
    model: Any = tiny(arch)
    batch = inputs_of(model, rows=len(ROWS), tokens=6)
    bank = three(model)
    bank.fast_path = fused
    index = torch.arange(len(ROWS)).unsqueeze(1).expand(-1, 6)
    by_row = logits(model, bank, ROWS, batch)
    assert torch.equal(by_row, logits(model, bank, Route.tokens(ROWS, index), batch))
    assert torch.equal(by_row, logits(model, bank, Route.tokens(ROWS, index.reshape(-1)), batch))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "conv1d", "embedding", "embedding-scaled"])
def test_each_token_has_its_own_dense_weight(name: str, fused: bool) -> None:
    """Token t of a layer comes out as through the dense weight of its own mix, in padded rows and in a flat batch."""
    case = CASES[name]
    model = case.model(torch.float64)
    bank = three(model, target_modules="layer")
    bank.fast_path = fused
    x = case.input(torch.float64)
    index = torch.tensor([[0, 3, 1, 2], [5, 0, 4, 2]])
    with bank.use(Route.tokens(ROWS, index)):
        found = model(x)
    flat_x = x.reshape(1, 8, *x.shape[2:])
    with bank.use(Route.tokens(ROWS, index.reshape(1, -1))):
        flat = model(flat_x)
    for row in range(2):
        for token in range(4):
            wanted = merged_model(bank, ROWS[index[row, token]])(x[row, token : token + 1])[0]
            assert torch.allclose(found[row, token], wanted, rtol=1e-10, atol=1e-11)
            assert torch.allclose(flat[0, 4 * row + token], wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["conv2d", "conv2d-stride", "conv2d-circular"])
def test_each_image_has_its_own_dense_weight(name: str) -> None:
    """Rows of a convolution are images."""
    case = CASES[name]
    model = case.model(torch.float64)
    bank = three(model, target_modules="layer")
    x = case.input(torch.float64)
    for route in (["lora", "dora"], [None, {"lora": 0.3, "dora": 0.7}]):
        with bank.use(route):
            found = model(x)
        for row in range(2):
            assert torch.allclose(found[row], merged_model(bank, route[row])(x)[row], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_broken_in_one_adapter_stays_in_its_rows(fused: bool, value: float) -> None:
    """NaN or inf in one adapter reaches its own rows and its own gradients only."""
    model: Any = tiny("llama")
    batch = inputs_of(model, rows=4)
    bank = three(model)
    bank.fast_path = fused
    route = ["lora", "dora", None, {"lora": 0.5, "rs": 0.5}]

    def gradients() -> tuple[Tensor, dict[str, list[Tensor]]]:
        with bank.use(route):
            out = model(**batch).logits
        for name in bank:
            for parameter in bank.parameters(name):
                parameter.grad = None
        out.square().mean((1, 2)).nan_to_num(0, 0, 0).sum().backward()
        return out.detach(), {name: [p.grad for p in bank.parameters(name) if p.grad is not None] for name in bank}

    healthy, slopes = gradients()
    with torch.no_grad():
        for own in bank["dora"].tensors.values():
            own["lora_A"][0, 0] = value
            own["lora_magnitude_vector"][0] = value
    broken, others = gradients()
    assert not broken[1].isfinite().all()
    for row in (0, 2, 3):
        assert torch.equal(bits(broken[row]), bits(healthy[row]))
    for name in ("lora", "rs"):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(slopes[name], others[name], strict=True))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_adapters_that_take_no_part_get_no_gradient(fused: bool) -> None:
    """Gradients of adapters outside the route, or with weight 0, stay None and not zero."""
    model: Any = tiny("llama")
    bank = three(model)
    bank.fast_path = fused
    for route in ("lora", ["lora", None], [{"lora": 1, "rs": 0}, "lora"]):
        with bank.use(route):
            model(**inputs_of(model)).logits.sum().backward()
        assert all(p.grad is not None for p in bank.parameters("lora"))
        assert all(p.grad is None for name in ("dora", "rs") for p in bank.parameters(name))


def test_nested_use_comes_back() -> None:
    """The inner route holds inside, the outer one after it, the base after both; an exception changes nothing about that."""
    model: Any = tiny("llama")
    batch = inputs_of(model)
    bank = three(model)
    alone = {name: logits(model, bank, name, batch) for name in (None, "lora", "dora")}

    def fail() -> None:
        with bank.use("dora"):
            assert torch.equal(model(**batch).logits, alone["dora"])
            raise ZeroDivisionError

    with torch.no_grad():
        with bank.use("lora"):
            with pytest.raises(ZeroDivisionError):
                fail()
            assert torch.equal(model(**batch).logits, alone["lora"])
            with bank.use(None):
                assert torch.equal(model(**batch).logits, alone[None])
                with pytest.raises(RouteError, match="in use by an active route"):
                    bank.remove("lora")
            with pytest.raises(RouteError, match="cannot be detached while a route is active"):
                bank.detach()
        assert torch.equal(model(**batch).logits, alone[None])


def test_an_exception_in_the_forward_leaves_no_route_behind() -> None:
    """Where the model itself raises, the next call runs under what is open then."""
    model: Any = tiny("llama")
    batch = inputs_of(model)
    bank = three(model)
    expected = logits(model, bank, ["lora", None], batch)
    wrong = {"input_ids": torch.full((2, 7), 10**6)}
    with torch.no_grad(), bank.use(["lora", None]):
        for _ in range(3):
            with pytest.raises(IndexError):
                model(**wrong)
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, logits(model, bank, None, batch))
    state = bank.runtime.tracker.state
    assert state.current is None and state.around == () and bank.runtime.tracker.context is None


@pytest.mark.parametrize("route", [["lora", None, "lora"], ["lora"], ["lora"] * 3, [None] * 5])
def test_the_number_of_rows_must_fit(route: list[Any]) -> None:
    """A list of another length than the batch is an error that names both, also where all its entries are alike."""
    model: Any = tiny("llama")
    bank = three(model)
    with pytest.raises(RouteError, match=f"the route has {len(route)} rows, the batch has 2.*num_beams"):
        logits(model, bank, route, inputs_of(model))


def test_the_number_of_tokens_must_fit() -> None:
    """A token route of another length names the layer, its sizes and the route's."""
    model: Any = tiny("llama")
    bank = three(model)
    route = Route.tokens(["lora", None], torch.tensor([0, 1, 1]))
    with pytest.raises(RouteError, match=r"q_proj.*2 x 7.*route of 3 tokens"):
        logits(model, bank, route, inputs_of(model))


@pytest.mark.parametrize(
    ("route", "text"),
    [
        ([], "at least one row"),
        (3, "found int"),
        ([3], "found 3"),
        ({"lora": float("nan")}, "finite weights"),
        ({"lora": "much"}, "finite weights"),
        ({1: 0.5}, "finite weights"),
        ([["lora"]], "found \\['lora'\\]"),
        ({"lora", "rs"}, "found set"),
    ],
)
def test_what_is_no_route_is_said(route: Any, text: str) -> None:
    """Mistakes in a route are errors before anything runs."""
    bank = three(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(RouteError, match=text), bank.use(route):
        pass


def test_unknown_adapters_and_bad_repeats_are_told() -> None:
    """A name that is not in the bank lists those that are; repeat must be a whole number of rows."""
    bank = three(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(AdapterError, match='no adapter "sql"; it has: lora, dora, rs'), bank.use(["lora", {"sql": 1}]):
        pass
    for repeat in (0, -1, 1.5, True):
        with pytest.raises(RouteError, match="repeat"), bank.use(["lora"], repeat=repeat):  # type: ignore[arg-type]
            pass
    with pytest.raises(RouteError, match="repeat"), bank.use(Route.parse(["lora", None]), repeat=2):
        pass


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([True]), [0, 1]]
)
def test_token_numbers_must_be_numbers_of_mixes(index: Any) -> None:
    """Numbers past the mixes, negative ones and what is not a tensor of whole numbers are errors."""
    with pytest.raises(RouteError, match="token route"):
        Route.tokens(["lora", None], index)


def test_numbers_of_any_kind_are_weights() -> None:
    """Weights may be numbers of other libraries; zero drops an adapter from the mix."""
    numpy = pytest.importorskip("numpy")
    assert Route.parse({"a": numpy.float32(0.5), "b": 0}).mixes == ((("a", 0.5),),)


def test_the_head_may_see_some_tokens() -> None:
    """With an adapter on the head, `keep` says which tokens of a flat batch it sees."""
    model: Any = tiny("llama", dtype=torch.float64)
    bank = three(model, target_modules=("lm_head", "q_proj"))
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    route = Route.tokens(ROWS[:4], index)
    whole = logits(model, bank, route, {"input_ids": ids})
    keep = torch.tensor([2, 4, 8])
    with torch.no_grad(), bank.use(route, keep=keep):
        some = model(input_ids=ids, logits_to_keep=keep).logits
    assert torch.allclose(some, whole[:, keep], rtol=1e-12, atol=1e-12)
    with pytest.raises(RouteError, match=r"lm_head.*1 x 3"), torch.no_grad(), bank.use(route):
        model(input_ids=ids, logits_to_keep=keep)


def test_a_part_of_the_model_may_be_called_alone() -> None:
    """The body of a model, one block or one layer follows the route like the whole; each call draws its own dropout."""
    model: Any = tiny("llama")
    bank = three(model)
    batch = inputs_of(model)
    with torch.no_grad(), bank.use(["lora", None]):
        hidden = model.model(**batch).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**batch).logits)
        q = model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 7, 32)
        assert torch.equal(q(x)[1], nn.functional.linear(x, q.weight)[1])
        assert not torch.equal(q(x)[0], nn.functional.linear(x, q.weight)[0])
    with torch.no_grad(), bank.use(["lora", None]), pytest.raises(RouteError, match="2 rows, the batch has 3"):
        model.model(input_ids=torch.ones(3, 4, dtype=torch.long))
    bank.add("drops", LoRA(r=2, lora_dropout=0.5))
    nudge(bank["drops"])
    with torch.no_grad(), bank.use("drops", training=True):
        first, second = (model.model(**batch).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (q(x) for _ in range(2))
        assert not torch.equal(first, second)
    assert bank["drops"].draws == 4


def test_a_copy_of_a_model_has_a_bank_of_its_own() -> None:
    """Routes opened on one bank do not reach the copy's."""
    model: Any = tiny("llama")
    bank = three(model)
    batch = inputs_of(model)
    base = logits(model, bank, None, batch)
    with torch.no_grad(), bank.use("lora"):
        other = copy.deepcopy(model)
        assert torch.equal(other(**batch).logits, base)
        assert not torch.equal(model(**batch).logits, base)


def test_rows_may_outnumber_adapters_and_adapters_rows() -> None:
    """Forty rows of forty adapters of five ranks in one batch, each as if alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    bank = attach(model)
    names = [f"a{i}" for i in range(40)]
    for i, name in enumerate(names):
        method = (DoRA if i % 3 == 0 else LoRA)(r=1 + i % 5, lora_alpha=3)
        nudge(bank.add(name, method, seed=i), seed=i)
    x = torch.randn(40, 6, dtype=torch.float64)
    with bank.use(names):
        mixed = model(x)
    for i, name in enumerate(names):
        with bank.use(name):
            assert torch.allclose(mixed[i], model(x[i : i + 1])[0], rtol=1e-10, atol=1e-11)
