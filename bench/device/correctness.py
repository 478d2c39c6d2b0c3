"""Errors against fp64: whole steps of every method and kind of route, attention, the loss; isolation, and bits before and after attaching.

A step's gradients are compared with those of the plain form in fp64 on the CPU, on the same (rounded) weights. Beside each stands the error
of the plain form in the same data type on the device: the fast form may have three times as much, and a floor.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tests.tiny import tiny
from torch import Tensor

from bench.device.shapes import row, to_nf4
from bench.device.supervise import Row, Setting, check, figure
from veneer.adapters import DoRA, LoRA, attach
from veneer.adapters.runtime.route import Route
from veneer.data.batch import Batch, make_batch
from veneer.data.example import Example
from veneer.kernels.attention.segmented import plain as plain_attention
from veneer.kernels.attention.segmented import segment_attention
from veneer.kernels.attention.segments import Pattern, Segments
from veneer.kernels.cross_entropy import linear_cross_entropy
from veneer.kernels.cross_entropy import plain as plain_loss
from veneer.kernels.forms import Forms, use_forms
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.models.fast_modules import use_fast_forwards
from veneer.models.flat import FlatRunner
from veneer.training.loop.step import Stepper

_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_SEGMENTS = 12
Methods = Mapping[str, LoRA | DoRA]
CASES: dict[str, tuple[str, Methods, dict[str, Any]]] = {
    "LoRA": ("llama", {"a": LoRA(r=8)}, {}),
    "rsLoRA": ("llama", {"a": LoRA(r=8, use_rslora=True)}, {}),
    "DoRA": ("llama", {"a": DoRA(r=8)}, {}),
    "dropout": ("llama", {"a": LoRA(r=8, lora_dropout=0.1), "b": DoRA(r=4, lora_dropout=0.3)}, {}),
    "weighted mix": ("llama", {"a": LoRA(r=8), "b": LoRA(r=4)}, {"a": {"a": 0.7, "b": 0.3}}),
    "four jobs, scattered rows": ("llama", {"a": LoRA(r=2), "b": DoRA(r=3), "c": LoRA(r=16), "d": DoRA(r=8)}, {}),
    "windows": ("qwen3", {"a": LoRA(r=8), "b": DoRA(r=4)}, {}),
    "soft caps": ("gemma2", {"a": LoRA(r=8), "b": DoRA(r=4)}, {}),
    "experts": ("qwen3_moe", {"a": LoRA(r=8), "b": DoRA(r=4)}, {}),
    "sinks": ("gpt_oss", {"a": LoRA(r=4)}, {}),
    "NF4": ("llama", {"a": LoRA(r=8), "b": DoRA(r=4)}, {}),
}
"""name -> (architecture, adapters by job, routes that are not the job's own adapter)."""
_TINY_CASES = ("dropout", "weighted mix", "soft caps", "experts", "NF4")
"""Cases that take every path between them."""


def run(setting: Setting) -> Iterator[Row]:
    """All checks."""
    device = torch.device(setting.device)
    dtypes = (torch.float32,) if setting.tiny else (torch.float32, torch.bfloat16)
    fast = Forms(attention="varlen", grouped_tokens=4096)  # the compiled chains have a row of their own
    with use_forms(fast):
        yield from _all(dtypes, device, setting)
    yield from _compiled(dtypes, device, setting)


def _all(dtypes: Sequence[torch.dtype], device: torch.device, setting: Setting) -> Iterator[Row]:
    for dtype in dtypes:
        for name in _TINY_CASES if setting.tiny else CASES:
            # In bf16 another expert may be chosen for a token, which is not an error of the products.
            if dtype == torch.float32 or name not in ("experts", "sinks"):
                yield _step(name, dtype, device, setting)
        yield from _attention(dtype, device, setting)
        yield _loss(dtype, device, setting)
    yield from _isolation(device, setting)


def _compiled(dtypes: Sequence[torch.dtype], device: torch.device, setting: Setting) -> Iterator[Row]:
    """A step with compiled chains, where there is a GPU to compile for; and whether a step gives the same bits twice."""
    if device.type == "cuda":
        with use_forms(Forms(elementwise="compiled")):
            for dtype in dtypes:
                yield _step("DoRA", dtype, device, setting) | {"what": f"DoRA, compiled chains, {_name(dtype)}"}
    for form in ("plain", "varlen"):
        with use_forms(Forms(attention=form)):
            model: Any = tiny("llama").to(device, dtypes[-1])
            batch = _batch(["a"], 12 if setting.tiny else 96)
            one, other = (_gradients(model, {"a": DoRA(r=8)}, {}, batch, fast=True) for _ in range(2))
            changed = sum(_changed(one[key], other[key]) for key in one)
            yield figure(f"the same step twice, {form} attention: changed numbers", changed)


def _step(name: str, dtype: torch.dtype, device: torch.device, setting: Setting) -> Row:
    """The error of a step's gradients and losses."""
    arch, methods, routes = CASES[name]
    batch = _batch(list(routes or methods), 12 if setting.tiny else 96)
    sizes: dict[str, Any] = {} if setting.tiny or arch != "llama" else {"hidden_size": 512, "intermediate_size": 1024}
    model: Any = tiny(arch, max_position_embeddings=512, **sizes).to(dtype)
    if name == "NF4":
        to_nf4(model)
    exact = _exact(model)
    truth = _gradients(exact, methods, routes, batch, fast=False)
    model.to(device)
    plain = _gradients(model, methods, routes, batch, fast=False)
    use_fast_forwards(model)
    fast = _gradients(model, methods, routes, batch, fast=True)
    rounding = _apart(plain, truth)
    found = check(f"{name}, {_name(dtype)}", _apart(fast, truth), max(_FLOOR[dtype], 3 * rounding), "relative")
    return found | {"plain": rounding}


def _exact(model: Any) -> Any:
    """A copy in fp64, with dense weights."""
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                # What the layer computes with: the weight dequantized to the compute dtype.
                dense.weight = torch.nn.Parameter(child.quantized.dequantize(dtype=child.dtype), requires_grad=False)
                dense.bias = child.bias
                setattr(module, name, dense)
    found.config._experts_implementation = "eager"  # grouped products have no form in fp64
    return found.double()


def _batch(jobs: list[str], longest: int) -> Batch:
    """Rows of several lengths that belong to the jobs in turn."""
    draw = random.Random(1)
    sizes = [4 + draw.randrange(longest - 3) for _ in range(_SEGMENTS)]
    return make_batch(
        [row(draw, size, 320, i) for i, size in enumerate(sizes)], [jobs[i % len(jobs)] for i in range(_SEGMENTS)]
    )


def _gradients(
    model: Any, methods: Methods, routes: Mapping[str, Any], batch: Batch, *, fast: bool
) -> dict[str, Tensor]:
    """The gradient of every tensor of the adapters, and each job's loss, in fp64 on the CPU."""
    bank = attach(model)
    bank.fast_path = fast
    draw = torch.Generator().manual_seed(5)
    for number, (name, method) in enumerate(methods.items()):
        for _, key, parameter in bank.add(name, method, seed=number).named_tensors():
            if key != "lora_magnitude_vector":  # masters of an fp64 base are drawn in fp64, which gives other numbers
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    losses = Stepper(FlatRunner(model), bank, dict(routes)).forward_backward(batch)
    found = {f"{job}: loss": torch.tensor(one.loss, dtype=torch.float64) for job, one in losses.items()}
    for name in methods:
        for site, key, parameter in bank[name].named_tensors():
            if parameter.grad is not None:
                found[f"{name}: {site}.{key}"] = parameter.grad.detach().double().cpu()
    bank.detach()
    return found


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The distance (L2) of two sets of gradients relative to their size; infinite if they have different tensors."""
    if one.keys() != other.keys():
        return float("inf")
    off = sum(float((one[key] - other[key]).square().sum()) for key in other if ": loss" not in key)
    size = sum(float(other[key].square().sum()) for key in other if ": loss" not in key)
    losses = [float((one[key] - other[key]).abs() / other[key].abs()) for key in other if ": loss" in key]
    return max([(off / size) ** 0.5, *losses])


def _attention(dtype: torch.dtype, device: torch.device, setting: Setting) -> Iterator[Row]:
    """Attention inside segments and its gradients, with and without a window."""
    bounds = (0, 5, 6, 14) if setting.tiny else (0, 700, 701, 1500, 2048)
    size, tokens = 8 if setting.tiny else 64, bounds[-1]
    draw = torch.Generator().manual_seed(2)
    made = [torch.randn(heads, tokens, size, generator=draw).to(dtype) for heads in (4, 2, 2, 4)]
    for name, pattern in (
        ("causal", Pattern()),
        ("window of 4", Pattern(before=3)),
        ("both ways", Pattern(after=None)),
    ):
        found = []
        for kind, place, form in (
            (torch.float64, "cpu", plain_attention),
            (dtype, device, plain_attention),
            (dtype, device, segment_attention),
        ):
            q, k, v, g = (t.to(place, kind, copy=True).requires_grad_() for t in made)
            out = form(q, k, v, Segments(bounds), pattern, scale=size**-0.5)
            grads = torch.autograd.grad(out, (q, k, v), g.detach().transpose(0, 1))
            found.append({str(i): t.detach().double().cpu() for i, t in enumerate((out, *grads))})
        rounding = _apart(found[1], found[0])
        yield check(
            f"attention, {name}, {_name(dtype)}",
            _apart(found[2], found[0]),
            max(_FLOOR[dtype], 3 * rounding),
            "relative",
        )


def _loss(dtype: torch.dtype, device: torch.device, setting: Setting) -> Row:
    """The fused loss and its gradient, in several chunks."""
    tokens, width, words = (9, 16, 50) if setting.tiny else (1500, 256, 50_000)
    draw = torch.Generator().manual_seed(3)
    hidden, head = (
        torch.randn(tokens, width, generator=draw).to(dtype),
        torch.randn(words, width, generator=draw).to(dtype) / 8,
    )
    targets, weights = torch.randint(words, (tokens,), generator=draw), torch.rand(tokens, generator=draw)
    found = []
    for kind, place, form in (
        (torch.float64, "cpu", plain_loss),
        (dtype, device, plain_loss),
        (dtype, device, linear_cross_entropy),
    ):
        x = hidden.to(place, kind, copy=True).requires_grad_()
        total, losses = form(x, head.to(place, kind), None, targets.to(place), weights.to(place))
        (grad,) = torch.autograd.grad(total, x)
        found.append({"losses": losses.detach().double().cpu(), "grad": grad.double().cpu()})
    rounding = _apart(found[1], found[0])
    return check(f"loss, {_name(dtype)}", _apart(found[2], found[0]), max(_FLOOR[dtype], 3 * rounding), "relative")


@torch.no_grad()
def _isolation(device: torch.device, setting: Setting) -> Iterator[Row]:
    """A NaN stays with its adapter, base rows and a detached model keep their bits, and a row is the same alone and in company."""
    model: Any = tiny("llama").to(device)
    runner = FlatRunner(model)
    batch = _batch(["a", "b"], 12)
    before = runner.logits(batch)
    bank = attach(model)
    for number, name in enumerate("ab"):
        for _, key, parameter in bank.add(name, DoRA(r=4), seed=number).named_tensors():
            if key == "lora_B":
                parameter.data.fill_(0.05)
    routes = ["a", None, "b"] * 4
    index = torch.arange(3).repeat(4).repeat_interleave(batch.offsets.diff())
    with bank.use(Route.tokens(["a", None, "b"], index)):
        mixed = runner.logits(batch)
        # In one batch of the same shape, another adapter's values change nothing.
        next(p for _, key, p in bank["a"].named_tensors() if key == "lora_B").data.fill_(float("nan"))
        spoilt = runner.logits(batch)
    others = (index != 0).to(device)
    yield check(
        "a NaN in one adapter: changed numbers of other rows", _changed(mixed[others], spoilt[others]), 0, "numbers"
    )
    bank.detach()
    yield check("attach and detach: changed numbers", _changed(before, runner.logits(batch)), 0, "numbers")
    first = int(batch.offsets[1])
    alone = make_batch([row_of(batch, 0)], [routes[0]])
    yield figure(
        "a row alone against in company: largest difference", float((runner.logits(alone) - before[:first]).abs().max())
    )


def row_of(batch: Batch, number: int) -> Example:
    """A segment of a batch as an example."""
    ids = tuple(batch.ids[int(batch.offsets[number]) : int(batch.offsets[number + 1])].tolist())
    return Example(ids, (0.0,) * len(ids), "rows")


def _changed(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
