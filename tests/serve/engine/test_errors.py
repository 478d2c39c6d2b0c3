"""Errors inside the engine: they end the requests that they belong to, or all of them, and nothing waits for ever."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.serve.engine.traces import answer, engine, folders, tokens

from veneer.checkpoints.peft.read import TEMPLATE
from veneer.errors import CheckpointError, ServeError
from veneer.serve.engine import answer as answer_module
from veneer.serve.engine import engine as engine_module
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Event, Finished, GenerationRequest, Mix, SamplingParams, TextDelta

PROMPT = tuple(range(20, 45))


def greedy(name: str, mix: Mix = (), *, embed: bool = False) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={2: -100})
    return GenerationRequest(name, PROMPT, mix, sampling, embed=embed)


def ends(made: Engine, *requests: GenerationRequest) -> list[tuple[Finished, list[int]]]:
    """The end of each request and its tokens, of requests that run together."""
    streams = [made.submit(one) for one in requests]
    while made.step():
        pass
    found = [list(stream) for stream in streams]
    return [(events[-1], tokens(events)) for events in found if isinstance(events[-1], Finished)]


def engine_with_adapter(tmp_path: Path) -> tuple[Engine, Path]:
    """An engine that has an adapter "a", and its folder."""
    made = engine()
    (path,) = folders(tmp_path, 1)
    made.load_adapter("a", path)
    return made, path


def failing(real: Any, fails: Any) -> Any:
    """A function that raises where ``fails(*args)``."""

    def call(*args: Any, **options: Any) -> Any:
        if fails(*args):
            raise RuntimeError("injected")
        return real(*args, **options)

    return call


@pytest.mark.parametrize("place", ["embed", "choose", "text", "receiver"])
def test_an_error_ends_its_own_request(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """An error in the embedding, the choice or the text of one request ends it, and the other is answered as alone."""
    made = engine()
    expected = answer(made, greedy("alone"))
    if place == "embed":
        monkeypatch.setattr(made, "_embedder", failing(made._embedder, lambda sequence: True))
    elif place == "choose":
        monkeypatch.setattr(
            engine_module,
            "choose",
            failing(engine_module.choose, lambda these, *_: any(one.id == "bad" for one in these)),
        )
    elif place == "text":
        monkeypatch.setattr(
            engine_module,
            "next_token",
            failing(answer_module.next_token, lambda one, _: one.id == "bad" and one.generated == 2),
        )
    if place == "receiver":  # one that takes no event, its end included
        made.submit(greedy("bad"), failing(lambda event: None, lambda event: True))
        ((good, found),) = ends(made, greedy("good"))
    else:
        (bad, _), (good, found) = ends(made, greedy("bad", embed=place == "embed"), greedy("good"))
        assert bad.reason == "error" and "injected" in str(bad.error)
    assert good.reason == "length" and found == expected
    assert made.metrics().finished["error"] == 1 and made.metrics().free_blocks == made.metrics().blocks


def test_an_adapter_that_does_not_fit_into_memory_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an adapter cannot be moved to the device, its request ends, nothing stays behind, and the next one is answered."""
    made, path = engine_with_adapter(tmp_path)
    expected = answer(made, greedy("r", (("a", 1.0),)))
    made.unload_adapter("a")
    made.step()
    made.load_adapter("a", path)
    assert made.bank is not None
    with monkeypatch.context() as patched:
        patched.setattr(made.bank, "_place", failing(None, lambda adapter: True))
        ((last, _),) = ends(made, greedy("r", (("a", 1.0),)))
    assert last.reason == "error" and "injected" in str(last.error)
    assert len(made.bank) == 0 and not made.bank.runtime.layers and made.adapters()[0].running == 0
    assert answer(made, greedy("r", (("a", 1.0),))) == expected


def test_an_embedding_that_waits_for_its_adapter_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the adapter of an embedding is read again, another request is answered; then the embedding is that of the adapter."""
    made, _ = engine_with_adapter(tmp_path)
    ((first, _),) = ends(made, greedy("first", (("a", 1.0),), embed=True))
    (version,) = made._store._versions
    made._store._out_of_bank(version)
    version.adapter, let, read = None, threading.Event(), made._store._read
    monkeypatch.setattr(made._store, "_read", lambda *place: let.wait(10) and read(*place))
    waiting = made.submit(greedy("waiting", (("a", 1.0),), embed=True))
    ((other, _),) = ends(made, greedy("other"))
    assert other.reason == "length" and waiting.poll() is None
    let.set()
    while (event := waiting.poll()) is None:
        made.step()
    while not isinstance(event, Finished):
        made.step()
        event = waiting.poll()
    assert event.embedding == first.embedding is not None


def test_an_adapter_never_answers_under_another_chat_template(tmp_path: Path) -> None:
    """An adapter keeps the template that it was loaded with, whatever becomes of the file; one that cannot be read is refused."""
    made = engine()
    (path,) = folders(tmp_path, 1)
    (path / TEMPLATE).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=TEMPLATE):
        made.load_adapter("a", path)
    for text in ("{{ 1 }}", "{{ 2 }}"):
        (path / TEMPLATE).write_text(text, encoding="utf-8")
        made.load_adapter("a", path)
        (path / TEMPLATE).write_bytes(b"\xff")
        assert [one.template for one in made.adapters()] == [text]


def test_a_step_that_fails_does_not_give_tokens_to_a_models_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model keeps the states, a request before one that fails in the same step gets the answer that it gets alone."""
    made = engine("mamba")

    def scored(name: str) -> GenerationRequest:
        return replace(greedy(name), sampling=replace(greedy(name).sampling, logprobs=0))

    def logprobs(events: list[Event]) -> list[float]:
        return [entry.logprob for event in events if isinstance(event, TextDelta) for entry in event.logprobs]

    expected = logprobs(list(made.run(scored("alone"))))
    monkeypatch.setattr(
        made.runner,
        "_run",
        failing(made.runner._run, lambda chunk: chunk.sequence.id == "bad" and chunk.sequence.generated == 2),
    )
    good, bad = [made.submit(scored(name)) for name in ("good", "bad")]
    while made.step():
        pass
    assert logprobs(list(good)) == expected and len(expected) == 6
    assert len(logprobs(list(bad))) == 2


def test_an_engine_that_fails_ends_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error outside every request, those that run end with it, new ones are refused, and `stop` returns."""
    made = engine()
    monkeypatch.setattr(made._scheduler, "plan", failing(None, lambda: True))
    stream = made.submit(greedy("r"))
    made.start()
    last = stream.get(timeout=10)
    assert isinstance(last, Finished) and "restart the server" in str(last.error)
    with pytest.raises(ServeError, match="RuntimeError: injected"):
        made.submit(greedy("s"))
    made.stop()
