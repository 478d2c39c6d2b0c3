"""Answers are those of transformers and of each request alone, whatever runs beside them, and everything is given back."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serve.engine.traces import answer, engine, folders, randomised, request, tokens
from tests.tiny import tiny, tiny_tokenizer

from veneer import LoRA
from veneer.errors import BaseModelError, ConfigError, EngineBusyError, ServeError
from veneer.serve.engine.adapters import AdapterLimits
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import (
    MAX_TENANTS,
    OTHER_TENANTS,
    Event,
    Finished,
    GenerationRequest,
    Grammar,
    Mix,
    PromptScored,
    SamplingParams,
    TenantCounter,
    TextDelta,
)
from veneer.serve.engine.runner import ModelCacheRunner, PagedRunner
from veneer.serve.engine.scheduler import SchedulerLimits

PROMPT = tuple(range(20, 45))


def generated(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens by transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def greedy(prompt: tuple[int, ...], count: int, mix: Mix = ()) -> GenerationRequest:
    return GenerationRequest("r", prompt, mix, SamplingParams(max_tokens=count, ignore_eos=True, logit_bias={2: -100}))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral", "phi3"])
def test_paged_answers_equal_transformers(arch: str) -> None:
    """Flat models, windows, soft caps and experts included: the same greedy tokens, from a prompt in pieces of seven tokens."""
    made = engine(arch, EngineLimits(context=128, block=4, scheduler=SchedulerLimits(step_tokens=7)))
    assert isinstance(made.runner, PagedRunner)
    assert answer(made, greedy(PROMPT, 10)) == generated(made.model, PROMPT, 10)
    assert answer(made, greedy(PROMPT, 12)) == generated(made.model, PROMPT, 12)
    assert made.metrics().cached_tokens == 24 and made.metrics().free_blocks == made.metrics().blocks


@pytest.mark.parametrize("arch", ["bloom", "falcon", "mamba"])
def test_other_models_use_their_own_cache(arch: str) -> None:
    """Position biases and states along the tokens: the same tokens by the model's own cache, and the reason is told."""
    made = engine(arch)
    assert isinstance(made.runner, ModelCacheRunner) and made.runner.reason
    assert answer(made, greedy(PROMPT, 8)) == generated(made.model, PROMPT, 8)


def test_models_that_do_not_generate_are_refused() -> None:
    """A model that looks ahead and one with two inputs are errors."""
    for arch in ("bert", "t5"):
        with pytest.raises(BaseModelError, match="generate"):
            Engine(tiny(arch), tiny_tokenizer())


def test_mixed_equals_solo_in_a_random_trace(tmp_path: Path) -> None:
    """Forty requests over six adapters, mixes and the base, with replacements, evictions, preemptions and cancellations: every answer has
    the tokens of the same request alone on a fresh engine."""
    paths = folders(tmp_path, 6)
    limits = EngineLimits(
        context=64,
        cache_tokens=320,
        block=4,
        scheduler=SchedulerLimits(running=8, step_tokens=24, patience=4, reserve=4),
        adapters=AdapterLimits(in_bank=3, in_memory=4),
    )
    mixed = engine(limits=limits)
    solo = engine(limits=EngineLimits(context=64))
    for number, path in enumerate(paths):
        solo.load_adapter(path.name, path)
        if number < 4:
            mixed.load_adapter(path.name, path)
    draw = random.Random(3)
    stands = {f"a{n}": f"a{n}" for n in range(4)}  # the name in the mixed engine -> the folder behind it
    asked, streams, cut = [], [], set()
    for number in range(40):
        if number % 8 == 7:  # a name stands for another folder from now on; running requests keep the old one
            name, path = f"a{draw.randrange(4)}", draw.choice(paths)
            mixed.load_adapter(name, path)
            stands[name] = path.name
        names = draw.sample(sorted(stands), draw.choice([0, 1, 1, 2]))
        mix = tuple((name, 1.0 if len(names) == 1 else draw.choice([0.3, 0.5, 0.8])) for name in names)
        one = request(number, mix, draw)
        behind: dict[str, float] = {}  # two names may stand for one folder
        for name, weight in mix:
            behind[stands[name]] = behind.get(stands[name], 0.0) + weight
        asked.append((one, tuple(behind.items())))
        streams.append(mixed.submit(one))
        for _ in range(draw.randrange(3)):
            mixed.step()
        if draw.random() < 0.15:
            cut.add(number)
            mixed.cancel(one.id)
    events: list[list[Event]] = [[] for _ in streams]
    for _ in range(5000):
        mixed.step()
        for mine, stream in zip(events, streams, strict=True):
            while (event := stream.poll()) is not None:
                mine.append(event)
        if all(mine and isinstance(mine[-1], Finished) for mine in events):
            break
        time.sleep(0.001)
    compared = 0
    for number, ((one, mix), mine) in enumerate(zip(asked, events, strict=True)):
        last = mine[-1]
        assert isinstance(last, Finished) and last.error is None
        expected = answer(solo, GenerationRequest(one.id, one.prompt, mix, one.sampling))
        if last.reason == "cancelled":
            assert number in cut and tokens(mine) == expected[: len(tokens(mine))]
        else:
            assert tokens(mine) == expected, number
            compared += 1
    metrics = mixed.metrics()
    assert compared >= 25 and metrics.adapter_evictions > 0 and metrics.cached_tokens > 0
    assert metrics.running == metrics.waiting == 0 and metrics.free_blocks == metrics.blocks
    assert all(one.running == one.waiting == 0 for one in mixed.adapters())


def test_an_adapter_that_left_memory_is_read_again_and_its_content_checked(tmp_path: Path) -> None:
    """With room for one adapter in memory the others are read when asked for; other content in the folder is an error of that request."""
    first, second = folders(tmp_path, 2)
    made = engine(limits=EngineLimits(context=128, adapters=AdapterLimits(in_bank=1, in_memory=1)))
    made.load_adapter("x", first)
    expected = answer(made, greedy(PROMPT, 5, (("x", 1.0),)))
    made.load_adapter("y", second)
    answer(made, greedy(PROMPT, 5, (("y", 1.0),)))
    made.load_adapter("z", folders(tmp_path / "more", 3)[2])
    assert next(one.place for one in made.adapters() if one.name == "x") == "disk"
    assert answer(made, greedy(PROMPT, 5, (("x", 1.0),))) == expected
    made._store._versions[0].adapter = None
    made._store._out_of_bank(made._store._versions[0])
    for file in second.iterdir():
        (first / file.name).write_bytes(file.read_bytes())
    last = list(made.run(greedy(PROMPT, 5, (("x", 1.0),))))[-1]
    assert isinstance(last, Finished) and last.reason == "error" and "holds another adapter" in str(last.error)


def test_stops_and_ends() -> None:
    """The model's end, stop tokens, stop strings and the limit each end an answer and say so."""
    made = engine()
    whole = list(made.run(greedy(PROMPT, 12)))
    ids, text = tokens(whole), "".join(event.text for event in whole if isinstance(event, TextDelta))
    assert whole[-1].reason == "length" and whole[-1].usage.completion_tokens == 12
    base = greedy(PROMPT, 12).sampling

    def ended(**params: Any) -> tuple[Finished, str, list[int]]:
        sampling = SamplingParams(**{**vars(base), **params})
        events = list(made.run(GenerationRequest("s", PROMPT, (), sampling)))
        return events[-1], "".join(event.text for event in events if isinstance(event, TextDelta)), tokens(events)

    last, _, found = ended(stop_token_ids=(ids[4],))
    assert (last.reason, last.stopped_by) == ("stop", ids[4]) and found == ids[: ids.index(ids[4])]
    stop = text[3:6]
    last, shorter, _ = ended(stop=(stop, "never"))
    assert (last.reason, last.stopped_by, shorter) == ("stop", stop, text[: text.index(stop)])
    last, nothing, found = ended(max_tokens=0)
    assert last.reason == "length" and not found and nothing == ""


def test_scores_of_prompt_and_answer_are_the_models() -> None:
    """Log-probabilities of the prompt's and the answer's tokens are those of the model on the whole text."""
    made = engine(limits=EngineLimits(context=128, scheduler=SchedulerLimits(step_tokens=8)))
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    events = list(made.run(GenerationRequest("r", PROMPT, (), sampling)))
    assert isinstance(events[0], PromptScored)
    ids = [*PROMPT, *tokens(events)]
    with torch.no_grad():
        expected = torch.log_softmax(made.model(torch.tensor([ids])).logits[0], -1)
    answers = [one for event in events if isinstance(event, TextDelta) for one in event.logprobs]
    assert events[0].logprobs[0] is None
    for at, one in enumerate([*events[0].logprobs[1:], *answers], start=1):
        assert one is not None and one.token == ids[at]
        assert one.logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        assert [token for token, _ in one.top] == expected[at - 1].topk(len(one.top)).indices.tolist()
    assert len(answers) == 5 and len(answers[0].top) == 3


def test_an_embedding_is_the_mean_state() -> None:
    """The embedding is the mean of the final states, of length 1, and nothing is generated."""
    made = engine()
    events = list(made.run(GenerationRequest("e", PROMPT, sampling=SamplingParams(max_tokens=0), embed=True)))
    with torch.no_grad():
        state = made.model.model(torch.tensor([PROMPT])).last_hidden_state[0].mean(0)
    assert len(events) == 1 and isinstance(events[0], Finished) and events[0].embedding is not None
    assert torch.allclose(torch.tensor(events[0].embedding), state / state.norm(), atol=1e-5)


def test_a_grammar_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer under a JSON schema is JSON of that schema, whatever the model would say, twice from one compilation; a bad schema is an
    error before anything runs."""
    made = engine()
    real, compiled = made._grammars._compile, []
    monkeypatch.setattr(made._grammars, "_compile", lambda grammar: compiled.append(grammar) or real(grammar))
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "n": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    sampling = SamplingParams(
        max_tokens=60, temperature=1.0, seed=5, grammar=Grammar("json_schema", json.dumps(schema))
    )
    events = list(made.run(GenerationRequest("j", PROMPT, (), sampling)))
    assert tokens(list(made.run(GenerationRequest("again", PROMPT, (), sampling)))) == tokens(events)
    assert len(compiled) == 1
    found = json.loads("".join(event.text for event in events if isinstance(event, TextDelta)))
    assert events[-1].reason == "stop" and set(found) == {"name", "n"} and 0 <= found["n"] <= 99
    with pytest.raises(ConfigError, match="grammar: "):
        made.submit(GenerationRequest("k", PROMPT, (), SamplingParams(grammar=Grammar("json_schema", '{"type": 3}'))))


def test_a_request_that_fails_alone_fails_alone() -> None:
    """An adapter with weights that are not finite ends its own requests with an error, and no other's."""
    made = engine()
    assert made.bank is not None
    made.bank.add("good", LoRA(r=2))
    made.bank.add("bad", LoRA(r=2))
    randomised(made.bank, "good", 1)
    for parameter in made.bank["bad"].requires_grad_(False).parameters():
        parameter.fill_(float("nan"))
    made = Engine(made.model, made.tokenizer, made.bank, EngineLimits(context=128))
    expected = answer(made, greedy(PROMPT, 8, (("good", 1.0),)))
    sampling = greedy(PROMPT, 8).sampling
    streams = [made.submit(GenerationRequest(name, PROMPT, ((name, 1.0),), sampling)) for name in ("bad", "good")]
    while made.step():
        pass
    bad, good = (list(stream) for stream in streams)
    assert bad[-1].reason == "error" and "not finite" in str(bad[-1].error)
    assert tokens(good) == expected


def test_requests_that_cannot_be_honoured_are_refused() -> None:
    """Parameters, prompts, names and a full queue are errors of `submit` that name what is wrong."""
    made = engine(limits=EngineLimits(context=32, waiting=1, scheduler=SchedulerLimits(running=1)))
    for prompt, match in (((), "prompt: "), ((400,), "prompt: "), (PROMPT * 2, "prompt: it has 50 tokens")):
        with pytest.raises(ConfigError, match=match):
            made.submit(GenerationRequest("r", prompt))
    with pytest.raises(ConfigError, match="top_p: "):
        made.submit(GenerationRequest("r", PROMPT, (), SamplingParams(top_p=2)))
    with pytest.raises(ConfigError, match="mix: x is named twice"):
        made.submit(GenerationRequest("r", PROMPT, (("x", 0.5), ("x", 0.5))))
    made.submit(GenerationRequest("r", PROMPT))
    with pytest.raises(ConfigError, match="id: "):
        made.submit(GenerationRequest("r", PROMPT))
    made.submit(GenerationRequest("s", PROMPT))
    with pytest.raises(EngineBusyError):
        made.submit(GenerationRequest("t", PROMPT))
    made.stop()
    with pytest.raises(ServeError, match="stopping"):
        made.submit(GenerationRequest("t", PROMPT))


def test_a_thread_serves_many_callers_and_lets_other_work_in() -> None:
    """Callers in several threads are answered, work beside serving holds the model between steps, and stop ends what is left."""
    made = engine()
    expected = answer(made, greedy(PROMPT, 10))
    made.start()
    found: list[list[int]] = []

    def call(number: int) -> None:
        found.append(
            tokens(list(made.submit(GenerationRequest(f"c{number}", PROMPT, (), greedy(PROMPT, 10).sampling))))
        )

    callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for _ in range(3):
        with made.exclusive():
            steps = made.metrics().steps
            time.sleep(0.01)
            assert made.metrics().steps == steps
    for caller in callers:
        caller.join(timeout=30)
    assert found == [expected] * 8
    long = made.submit(GenerationRequest("long", PROMPT, (), greedy(PROMPT, 90).sampling))
    made.stop(drain=0.0)
    assert list(long)[-1].reason == "cancelled" and made.metrics().running == 0


def test_counts_of_tenants_are_bounded() -> None:
    """Clients may name any number of tenants: those beyond the limit are counted together, and known ones go on by name."""
    counts = TenantCounter()
    for number in range(MAX_TENANTS + 500):
        counts.add(f"t{number}", 2)
    counts.add("t0", 1)
    assert counts["t0"] == 3 and counts[OTHER_TENANTS] == 1000 and len(counts) == MAX_TENANTS + 1
