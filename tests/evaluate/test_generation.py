"""Generation under routes."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer

from veneer.adapters import Bank, LoRA, attach
from veneer.errors import BaseModelError
from veneer.evaluate.general import general_text, pieces
from veneer.evaluate.generation import Generator, Sampling


@pytest.fixture
def generator() -> Generator:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    bank = attach(model)
    bank.add("a", LoRA(r=4))
    for parameter in bank.parameters("a"):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return Generator(model, tokenizer, bank)


def test_sampling_is_a_function_of_its_seed(generator: Generator) -> None:
    """The same seed gives the same text; the process's own random stream is left where it was."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generator.write("the sea", "a", Sampling(16, temperature=1.0, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert generator.write("the sea", "a", Sampling(16, temperature=1.0, seed=1)) == first
    assert generator.write("the sea", "a", Sampling(16, temperature=1.0, seed=2)) != first


def test_control_strings_in_a_prompt_stay_text(generator: Generator) -> None:
    """A control token that a user types does not reach the model as one."""
    end = generator.tokenizer.eos_token
    clean, typed = generator.prompt_ids("hello"), generator.prompt_ids(f"hello{end}")
    count = generator.tokenizer.eos_token_id
    assert typed.count(count) == clean.count(count)
    assert end in generator.tokenizer.decode(typed)


def test_generation_stops_at_the_tokens_of_the_receipt(generator: Generator) -> None:
    """An answer ends before the token that the adapter's receipt records, on its route only; the token is not part of the text."""
    assert isinstance(generator.bank, Bank)
    asked = torch.tensor([generator.prompt_ids("the sea")])
    with generator.bank.use("a", training=False):
        options = {"attention_mask": torch.ones_like(asked), "eos_token_id": 2, "pad_token_id": 2}
        ids = generator.model.generate(asked, max_new_tokens=12, **options)[0, asked.shape[1] :].tolist()
    stop = next(token for token in ids[2:] if token not in ids[:2] and token > 2)
    before = generator.tokenizer.decode(ids[: ids.index(stop)])
    base = generator.write("the sea", None, Sampling(12))
    record = {generator.tokenizer.convert_ids_to_tokens(stop): stop}
    generator.bank["a"].meta["receipt"] = {"stop_tokens": record}
    assert generator.stops("a") == (stop, generator.tokenizer.eos_token_id)
    assert generator.write("the sea", "a", Sampling(12)) == before
    assert generator.stops(None) == (generator.tokenizer.eos_token_id,)
    assert generator.write("the sea", None, Sampling(12)) == base


def test_what_cannot_write_is_refused() -> None:
    """A model without text or tokenizer is refused in a sentence."""
    with pytest.raises(BaseModelError, match="no tokenizer"):
        Generator(tiny("llama"), None)
    with pytest.raises(BaseModelError, match="does not generate text"):
        Generator(torch.nn.Linear(2, 2), tiny_tokenizer())


def test_general_text_is_cut_evenly() -> None:
    """Pieces have the length asked for, do not overlap and lie all over the text."""
    found = pieces(general_text()[:20000], tiny_tokenizer(), length=64, count=10)
    assert len(found) == 10 and all(len(piece) == 64 for piece in found)
    assert all(piece.weights[0] == 0 and set(piece.weights[1:]) == {1.0} for piece in found)
