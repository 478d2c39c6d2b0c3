"""Generation under routes."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer

from veneer.adapters import Bank, LoRA, attach
from veneer.errors import BaseModelError, ServeError
from veneer.evaluate.generation import Generator, Sampling
from veneer.serve.engine.request import SamplingParams
from veneer.serve.generation import TextGenerator


@pytest.fixture
def generator() -> TextGenerator:
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    bank = attach(model)
    bank.add("a", LoRA(r=4))
    for parameter in bank.parameters("a"):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return TextGenerator(model, tokenizer, bank)


def test_streamed_text_is_the_whole_text(generator: TextGenerator) -> None:
    """Piece by piece or at once, with and without an adapter, the text is the same; and the two routes differ."""
    texts = {}
    for route in (None, "a"):
        texts[route] = generator.write("the sea", route, SamplingParams(max_tokens=12))
        assert "".join(generator.stream("the sea", route, SamplingParams(max_tokens=12))) == texts[route]
    assert texts[None] != texts["a"]


def test_answers_under_different_routes_are_written_together(generator: TextGenerator) -> None:
    """One batch under a route for each prompt gives the text that each has alone."""
    limit, prompts = SamplingParams(max_tokens=12), ["the sea", "the sea", "two and two"]
    alone = [generator.write(prompt, route, limit) for prompt, route in zip(prompts, (None, "a", "a"), strict=True)]
    assert generator.write_many(prompts, [None, "a", "a"], limit) == alone and alone[0] != alone[1]
    assert generator.write_many(prompts[1:], "a", limit) == alone[1:]


def test_an_abandoned_stream_leaves_the_bank_free(generator: TextGenerator) -> None:
    """Ending the iteration early ends the generation and its route."""
    stream = generator.stream("the sea", "a", SamplingParams(max_tokens=50))
    next(stream)
    stream.close()
    assert isinstance(generator.engine.bank, Bank) and generator.engine.metrics().running == 0
    with generator.engine.bank.use(None):
        pass


def test_sampling_is_a_function_of_its_seed(generator: TextGenerator) -> None:
    """The same seed gives the same text; the process's own random stream is left where it was."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generator.write("the sea", "a", SamplingParams(max_tokens=16, temperature=1.0, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert generator.write("the sea", "a", SamplingParams(max_tokens=16, temperature=1.0, seed=1)) == first
    assert generator.write("the sea", "a", SamplingParams(max_tokens=16, temperature=1.0, seed=2)) != first


def test_control_strings_in_a_prompt_stay_text(generator: TextGenerator) -> None:
    """A control token that a user types does not reach the model as one."""
    end = generator.tokenizer.eos_token
    clean, typed = generator.prompt_ids("hello"), generator.prompt_ids(f"hello{end}")
    count = generator.tokenizer.eos_token_id
    assert typed.count(count) == clean.count(count)
    assert end in generator.tokenizer.decode(typed)


def test_a_failure_of_the_model_reaches_the_reader(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a step is raised where the text is read."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(generator.engine.runner, "run", broken)
    with pytest.raises(ServeError, match="RuntimeError: out of luck"):
        list(generator.stream("the sea"))


def test_generation_stops_at_the_tokens_of_the_receipt(generator: TextGenerator) -> None:
    """An answer ends before the token that the adapter's receipt records, on its route only; the token is not part of the text."""
    bank, limit = generator.engine.bank, SamplingParams(max_tokens=12)
    assert isinstance(bank, Bank)
    asked = torch.tensor([generator.prompt_ids("the sea")])
    with bank.use("a", training=False):
        options = {"attention_mask": torch.ones_like(asked), "eos_token_id": 2, "pad_token_id": 2}
        ids = generator.engine.model.generate(asked, max_new_tokens=12, **options)[0, asked.shape[1] :].tolist()
    stop = next(token for token in ids[2:] if token not in ids[:2] and token > 2)
    before = generator.tokenizer.decode(ids[: ids.index(stop)])
    base = generator.write("the sea", None, limit)
    record = {generator.tokenizer.convert_ids_to_tokens(stop): stop}
    bank["a"].meta["receipt"] = {"stop_tokens": record}
    stopping = TextGenerator(generator.engine.model, generator.tokenizer, bank)
    assert stopping.write("the sea", "a", limit) == before
    assert stopping.write("the sea", None, limit) == base


def test_greedy_text_is_that_of_transformers(generator: TextGenerator) -> None:
    """The text of a route is what transformers generates under it, up to the end token."""
    plain = Generator(generator.engine.model, generator.tokenizer, generator.engine.bank)
    for route in (None, "a", {"a": 0.5}):
        expected = plain.write("the sea", route, Sampling(30))
        assert generator.write("the sea", route, SamplingParams(max_tokens=30)) == expected


def test_what_cannot_write_is_refused() -> None:
    """A model without text or tokenizer is refused in a sentence."""
    with pytest.raises(BaseModelError, match="no tokenizer"):
        TextGenerator(tiny("llama"), None)
    with pytest.raises(BaseModelError, match="does not generate text"):
        TextGenerator(torch.nn.Linear(2, 2), tiny_tokenizer())
