"""Adapters of other methods than LoRA behind the engine: served where they change layers, refused in one sentence where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny, tiny_tokenizer
from tests.training.made import QUIET, SIZES

from veneer.adapters import IA3, BitFit, Full, Houlsby, LoRA, Method, Pfeiffer, PrefixTuning, PromptTuning, VeRA
from veneer.checkpoints import attach
from veneer.cli.main import main
from veneer.errors import AdapterError, VeneerError
from veneer.serve.engine.request import Finished, GenerationRequest, SamplingParams
from veneer.serve.generation import TextGenerator
from veneer.training import train

METHODS: dict[str, tuple[str, Method]] = {
    "ia3": ("llama", IA3()),
    "bitfit": ("gpt2", BitFit()),
    "houlsby": ("llama", Houlsby(bottleneck_size=4)),
    "pfeiffer": ("gpt2", Pfeiffer(bottleneck_size=4)),
    "vera": ("llama", VeRA(vera_rank=8)),
    "full": ("llama", Full(target_modules=["down_proj"])),
}
PROMPTS = ([5, 9, 13], [7, 8], [11, 40, 41, 42])


def trained(bank: Any, name: str, method: Method) -> None:
    bank.add(name, method)
    with torch.no_grad():
        for number, parameter in enumerate(bank.parameters(name)):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.3 * noise).requires_grad_(False)


def answers(generator: TextGenerator, routes: list[str | None]) -> list[tuple[int, ...]]:
    """The tokens of one answer under each route, all in the same steps."""
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    streams = [
        generator.engine.submit(
            GenerationRequest(f"r{at}", tuple(PROMPTS[at]), () if route is None else ((route, 1.0),), sampling)
        )
        for at, route in enumerate(routes)
    ]
    found: list[list[int]] = [[] for _ in routes]
    left = set(range(len(routes)))
    while left:
        generator.engine.step()
        for at in sorted(left):
            while (event := streams[at].poll()) is not None:
                if isinstance(event, Finished):
                    assert event.error is None
                    left.discard(at)
                else:
                    found[at] += event.tokens if hasattr(event, "tokens") else []
    return [tuple(one) for one in found]


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_change_layers_are_served(name: str, tmp_path: Path) -> None:
    """Loaded from its folder, beside base and LoRA rows in the same steps, each answer is that of the model called alone."""
    arch, method = METHODS[name]
    tokenizer = tiny_tokenizer()
    model = tiny(arch, vocab_size=len(tokenizer))
    bank = attach(model)
    trained(bank, "a", method)
    trained(bank, "lora", LoRA(r=2))
    expected = {}
    for at, route in enumerate(("a", None, "lora")):
        ids = list(PROMPTS[at])
        for _ in range(5):
            with torch.no_grad(), bank.use(route):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected[route] = ids[len(PROMPTS[at]) :]
    for one in ("a", "lora"):
        bank.save(one, tmp_path / one)
        bank.remove(one)
    generator = TextGenerator(model, tokenizer, bank)
    for one in ("a", "lora"):
        generator.engine.load_adapter(one, tmp_path / one)
    assert answers(generator, ["a", None, "lora"]) == [tuple(each) for each in expected.values()]
    with torch.no_grad():
        plain = int(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    assert expected["a"][0] != plain or expected["a"] != expected[None]


@pytest.mark.parametrize("method", [PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2)])
def test_virtual_tokens_are_refused_at_load(method: Method, tmp_path: Path) -> None:
    """One sentence when the folder is read, not in the middle of an answer."""
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    bank = attach(model)
    trained(bank, "a", method)
    bank.save("a", tmp_path / "a")
    bank.remove("a")
    generator = TextGenerator(model, tokenizer, bank)
    with pytest.raises(AdapterError, match=rf'"a" is a {method.label} adapter, which lengthens the sequence'):
        generator.engine.load_adapter("a", tmp_path / "a")


def test_a_head_is_refused_where_text_is_generated(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier's adapter is no language model: refused by generate, chat and the engine of serve, with the command that uses it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i}", "label": "ab"[i % 2]}) + "\n" for i in range(4)))
    own = {"base": str(place / "base"), "data": (rows,), "task": "classification", "steps": 1, "plan": False, "r": 2}
    train({**own, "out": tmp_path / "run", "dtype": "float32", "batch_size": 2}, console=QUIET)
    sentence = "has a head for classification, and text is generated by a language model; use veneer predict"
    monkeypatch.chdir(tmp_path)
    for words in (["generate", "run", "hello"], ["chat", "run"]):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err, words
    tokenizer = tiny_tokenizer()
    model = tiny("llama", num_key_value_heads=1, vocab_size=len(tokenizer), **SIZES)
    generator = TextGenerator(model, tokenizer, attach(model))
    with pytest.raises(VeneerError, match=sentence):
        generator.engine.load_adapter("a", tmp_path / "run")
