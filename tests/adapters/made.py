"""Layers and models for the tests of adapters: one small model for each kind of host, and what tests do to them again and again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters import Adapter, Bank, DoRA, LoRA, attach, bank_of
from veneer.kernels.quantized.module import QuantizedLinear
from veneer.kernels.quantized.state import quantize

METHODS: dict[str, LoRA | DoRA] = {
    "lora": LoRA(r=3, lora_alpha=6, target_modules="layer"),
    "rslora": LoRA(r=4, lora_alpha=5, use_rslora=True, target_modules="layer"),
    "dora": DoRA(r=3, lora_alpha=6, target_modules="layer"),
}


class Alone(nn.Module):
    """A model of one layer, and nothing else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Scaled(nn.Embedding):
    """An embedding that multiplies what it looks up, as Gemma's does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Spelt(nn.Linear):
    """A linear layer that writes the product anew, as Falcon's does."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Case:
    """A kind of layer and an input for it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0
    quantized: Mapping[str, Any] | None = None
    """Arguments of `quantize`, for a linear layer."""

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Alone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Alone(self.make())
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
        if self.quantized:
            weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
            model.layer = QuantizedLinear(quantize(weight, **self.quantized), bias)
        return model.to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(1, self.vocabulary, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(5, 7), (2, 4, 5)),
    "linear-no-bias": Case(lambda: nn.Linear(5, 7, bias=False), (2, 4, 5)),
    "linear-one-vector": Case(lambda: nn.Linear(5, 7), (5,)),
    "linear-two-sizes": Case(lambda: nn.Linear(5, 7), (6, 5)),
    "linear-spelt-out": Case(lambda: Spelt(5, 7), (2, 4, 5)),
    "conv1d": Case(lambda: Conv1D(7, 5), (2, 4, 5)),
    "embedding": Case(lambda: nn.Embedding(11, 6), (2, 4), 11),
    "embedding-padding": Case(lambda: nn.Embedding(11, 6, padding_idx=0), (2, 4), 11),
    "embedding-scaled": Case(lambda: Scaled(11, 6), (2, 4), 11),
    "conv2d": Case(lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 6)),
    "conv2d-no-bias": Case(lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 6)),
    "conv2d-stride": Case(lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 2, 5, 6)),
    "conv2d-dilation": Case(lambda: nn.Conv2d(2, 3, 3, dilation=2, padding="same"), (2, 2, 5, 6)),
    "conv2d-reflect": Case(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 6)),
    "conv2d-circular": Case(lambda: nn.Conv2d(2, 3, (3, 2), padding="same", padding_mode="circular"), (2, 2, 5, 6)),
    "conv2d-one-image": Case(lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    **{
        f"linear-{name}": Case(lambda: nn.Linear(37, 7), (2, 4, 37), quantized=arguments)
        for name, arguments in {
            "nf4": {"format": "nf4"},
            "nf4-single": {"format": "nf4", "double": False, "block": 32},
            "fp4": {"format": "fp4"},
            "int8": {"format": "int8"},
        }.items()
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def nudge(adapter: Adapter, by: float = 0.2, seed: int = 7) -> Adapter:
    """Move every tensor of an adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return adapter


def nudged(model: nn.Module, *names: str, method: LoRA | DoRA | None = None, by: float = 0.2) -> Bank:
    """A bank with nudged adapters of these names; each starts from a seed of its own."""
    bank = attach(model)
    for seed, name in enumerate(names):
        nudge(bank.add(name, method or LoRA(r=3, lora_alpha=6), seed=seed), by=by, seed=seed + 1)
    return bank


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, shape and dtype."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw + repr((tuple(tensor.shape), tensor.dtype)).encode()).hexdigest()


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that adapters must leave alone: values to the bit, names, classes, hooks, modes, flags."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    more = ("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "parameters": {n: (tensor_hash(p), id(p), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: (tensor_hash(b), id(b)) for n, b in model.named_buffers()},
        "state": {n: tensor_hash(v) for n, v in model.state_dict().items()},
        "modules": {n: (type(m), id(m), m.training) for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "hooks": {n: [len(getattr(m, name)) for name in (*hooks, *more)] for n, m in model.named_modules()},
    }


def values(model: nn.Module) -> dict[str, str]:
    """Hashes of a model's parameters and buffers."""
    return {name: tensor_hash(value) for name, value in (*model.named_parameters(), *model.named_buffers())}


def merged_model(bank: Bank, route: Any) -> nn.Module:
    """A copy of the base with an adapter merged in: the weights are loaded into a model that no bank has touched."""
    plain = copy.deepcopy(bank.model)
    inner = bank_of(plain)
    if inner is not None:
        inner.detach()
    for site in bank.sites.values():
        for path in site.names if site.stack is None else ():
            # A shared weight comes apart in merging.
            module = plain.get_submodule(path)
            module.weight = nn.Parameter(module.weight.detach().clone(), module.weight.is_floating_point())
    plain.load_state_dict(bank.merged_state_dict(route))
    return plain


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers: -0.0 and 0.0 differ, NaN equals itself."""
    return tensor.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])
