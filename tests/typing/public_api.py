"""The public names as a user's type checker sees them. ``make lint`` checks this file and nothing runs it.

Each line with an ignored error is a mistake that the types must find: an ignore that is not needed is an error too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

import veneer
from veneer import Adapter, Bank, Base, DoRA, LoRA


def load_and_use(ids: torch.Tensor) -> None:
    base = veneer.load_base("smollm2-135m", dtype="float32", device="cpu", quantize="nf4")
    assert_type(base, Base)
    bank = veneer.attach(base.model)
    assert_type(bank, Bank)
    assert_type(bank.add("one", LoRA(r=8, lora_alpha=16, target_modules=["q_proj"])), Adapter)
    assert_type(bank.load(Path("runs/two"), name="two"), Adapter)
    assert_type(bank["one"], Adapter)
    assert_type(bank.names, list[str])
    assert_type(bank.parameters("one"), list[nn.Parameter])
    assert_type(bank.module("one"), nn.Module)
    assert_type(bank.merged_state_dict({"one": 0.7, "two": 0.3}), dict[str, torch.Tensor])
    for name in bank:
        assert_type(name, str)
    with bank.use("one"):
        base.model(input_ids=ids)
    with bank.use(["one", None, {"one": 0.7, "two": 0.3}]):
        base.model(input_ids=ids)
    bank.save("one", "runs/one")
    bank.detach()


def attach_to_any_module() -> None:
    bank = veneer.attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert_type(bank, Bank)
    assert_type(bank.add("a", DoRA(r=2)), Adapter)


def train(rows: list[dict[str, Any]]) -> None:
    result = veneer.train(data=rows, base="smollm2-135m", r=8, out="runs/first")
    assert_type(result.adapter, Path)
    assert_type(result.best, Path)


def catch() -> None:
    try:
        veneer.load_base("nowhere")
    except veneer.errors.VeneerError as error:
        assert_type(error.exit_code, int)


def mistakes(bank: Bank) -> None:
    bank.add("a", "lora")  # type: ignore[arg-type]
    bank.use(3)  # type: ignore[arg-type]
    bank.laod("a")  # type: ignore[attr-defined]
    veneer.load_base(dtype="float32")  # type: ignore[call-arg]
    veneer.attatch(nn.Linear(2, 2))  # type: ignore[attr-defined]
