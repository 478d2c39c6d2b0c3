"""Arguments of the wrong type are told in one sentence, and objects describe themselves."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny

import veneer
from veneer import DoRA, LoRA
from veneer.adapters import Bank
from veneer.errors import VeneerError


@pytest.fixture(scope="module")
def bank() -> Bank:
    """A bank with one adapter."""
    found = veneer.attach(tiny("llama"))
    found.add("a", LoRA(r=2))
    return found


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a word for a method": (lambda bank: bank.add("y", "lora"), r"such as LoRA\(r=16\); found 'lora'"),
    "a class for a method": (lambda bank: bank.add("y", LoRA), "found the class LoRA"),
    "a dictionary for a method": (lambda bank: bank.add("y", {"r": 2}), r"found \{'r': 2\}"),
    "a number for a name": (lambda bank: bank.add(3, LoRA()), "3 cannot name an adapter"),
    "a number for a route": (lambda bank: bank.use(3).__enter__(), "a route is an adapter's name.*found int"),
    "a list for a name": (lambda bank: bank[["a"]], "the bank has no adapter"),
    "a name for a model": (lambda bank: veneer.attach("gpt2"), r"found str; load one first: veneer\.load_base"),  # type: ignore[arg-type]
    "a name for the model of a bank": (
        lambda bank: veneer.bank_of("x"),  # type: ignore[arg-type]
        r"bank_of takes a torch\.nn\.Module, found str; load one first",
    ),
    "a hub id for an adapter": (
        lambda bank: bank.load("somebody/some-lora"),
        "no adapter of that name in the local hub cache; HF_HUB_OFFLINE is set.*: hf download somebody/some-lora",
    ),
    "a number for a path": (lambda bank: bank.load(3), r"bank\.load takes the path of a folder; found int"),
    "nothing for a path": (lambda bank: bank.save("a", None), r"bank\.save takes the path of a folder; found NoneType"),
    "a folder for an adapter": (lambda bank: bank.insert("out"), r"bank\.insert takes an Adapter, found str"),
    "a number for a base": (lambda bank: veneer.load_base(3), "load_base takes the name or the path.*found int"),  # type: ignore[arg-type]
    "an option without its name": (lambda bank: DoRA(8), r"DoRA takes its options by name, such as r=\.\.\.; found 8"),  # type: ignore[call-arg]
    "a peer's name of an option": (lambda bank: LoRA(rank=8), r"rank: unknown option; did you mean r\?"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_type_is_told(bank: Bank, mistake: str) -> None:
    """An error of this package, of one line, with what is expected and what was found."""
    call, says = MISTAKES[mistake]
    with pytest.raises(VeneerError, match=says) as caught:
        call(bank)
    assert "\n" not in str(caught.value)
    assert bank.names == ["a"]


def test_a_base_for_a_model() -> None:
    """The base of load_base is not its model, and the message says where that is."""

    class Holder:
        model = tiny("llama")

    with pytest.raises(VeneerError, match=r"found Holder; give its model \(base\.model\)"):
        veneer.attach(Holder())  # type: ignore[arg-type]


def test_objects_describe_themselves(bank: Bank) -> None:
    """Bank, adapter and base name what they hold."""
    import torch

    assert repr(bank) == "Bank(LlamaForCausalLM, 16 sites, a: LoRA r=2)"
    parameters = f"{bank['a'].num_parameters():,}"
    assert (
        f"<td>a</td><td>LoRA</td><td>r=2</td><td>{len(bank['a'].tensors)}</td><td>{parameters}</td>"
        in bank._repr_html_()
    )
    assert repr(bank["a"]).startswith("Adapter('a', lora, 14 sites, ")
    base = veneer.Base(bank.model, None, "my-model", Path("x"), torch.float32)
    count = sum(parameter.numel() for parameter in bank.model.parameters())
    assert repr(base) == f"Base('my-model', LlamaForCausalLM, {count:,} parameters in float32)"
    empty = veneer.attach(tiny("gpt2"))
    assert "no adapters" in repr(empty)
    empty.detach()
    assert "detached" in repr(empty)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_help_shows_the_options(method: Any) -> None:
    """``help`` lists every option with its description and default, and nothing of the library that checks them."""
    text = pydoc.render_doc(method, renderer=pydoc.plaintext)  # type: ignore[attr-defined]
    assert f"{method.__name__}(*, r=16, lora_alpha=32.0, " in text
    for name, field in method.model_fields.items():
        assert name in text and " ".join(field.description.split()) in text and name in dir(method)
    assert not [word for word in ("model_dump", "model_validate", "model_construct", "__pydantic") if word in text]
