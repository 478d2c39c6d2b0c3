"""Failures of servers of many adapters, as their users reported them, each a test that none of them happens here.

Those that concern the engine run on it alone; those about HTTP and restarts have a server.
"""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tests.serve.api.made import ADMIN_KEY, Running, wait, write_adapters
from tests.serve.engine.traces import answer, engine, folders, randomised, tokens
from tests.tiny import tiny, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from veneer import DoRA, LoRA
from veneer.adapters.runtime.grouping import by_rank
from veneer.adapters.runtime.plan import Assignment
from veneer.checkpoints import attach
from veneer.data.chat.named_templates import NAMED_TEMPLATES
from veneer.errors import AdapterError
from veneer.serve.api.metrics import MAX_LABELS, ServeMetrics
from veneer.serve.api.parameters import ChatMessage
from veneer.serve.api.prompts import PromptRenderer
from veneer.serve.engine.adapters import AdapterLimits, AdapterStore
from veneer.serve.engine.engine import Engine, EngineLimits
from veneer.serve.engine.request import Finished, GenerationRequest, Mix, SamplingParams
from veneer.serve.engine.scheduler import SchedulerLimits
from veneer.serve.limits import ServeLimits

PROMPT = tuple(range(20, 45))
TOKENS = 8
HELLO: Any = [{"role": "user", "content": "Hello"}]


def greedy(count: int = 8, mix: Mix = (), *, name: str = "r", prompt: tuple[int, ...] = PROMPT) -> GenerationRequest:
    """A greedy request."""
    return GenerationRequest(name, prompt, mix, SamplingParams(max_tokens=count, ignore_eos=True))


def under(adapter: str, count: int = 8, *, name: str = "r") -> GenerationRequest:
    """A greedy request under one adapter."""
    return greedy(count, ((adapter, 1.0),), name=name)


def generated(model: Any, count: int) -> list[int]:
    """Greedy tokens by transformers."""
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


def last(events: list[Any]) -> Finished:
    """The end of a request."""
    assert isinstance(events[-1], Finished)
    return events[-1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of four adapters: LoRA, DoRA, rsLoRA and DoRA on two modules."""
    return folders(tmp_path_factory.mktemp("adapters"), 4)


@pytest.fixture(scope="module")
def alone(paths: list[Path]) -> dict[str, list[int]]:
    """The first tokens of each adapter and of the base, each on an engine of its own."""
    found = {"": answer(engine(), greedy(TOKENS))}
    for path in paths:
        made = engine()
        made.load_adapter("x", path)
        found[path.name] = answer(made, under("x", TOKENS))
    assert len({tuple(one) for one in found.values()}) == 5
    return found


@pytest.fixture(scope="module")
def server(place: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with the adapters sql, style and tone."""
    running = Running(place / "base", tmp_path_factory.mktemp("state"), adapters)
    yield running
    running.close()


@pytest.fixture(scope="module")
def adapters(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that a test may change."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(place / "base", folder, {"sql": LoRA(r=2), "style": DoRA(r=3), "tone": LoRA(r=4)})
    return folder


def test_01_stale_keys_and_values_after_a_reload_under_the_same_name(
    paths: list[Path], alone: dict[str, list[int]]
) -> None:
    """A name that is given another folder answers as the new folder does, from no block of the old one."""
    made = engine()
    cached = []
    for path in (paths[0], paths[1], paths[0]):
        made.load_adapter("x", path)
        assert answer(made, under("x", TOKENS)) == alone[path.name]
        cached.append(made.metrics().cached_tokens)
    assert cached == [0, 0, 16]  # the first content's own blocks are there again


def test_02_a_loaded_adapter_is_read_from_the_disk_at_each_step(
    paths: list[Path], alone: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is read once: its answers are the same when its folder is gone."""
    reads: list[str] = []
    read = AdapterStore._read

    def counted(store: AdapterStore, name: str, path: Path) -> Any:
        reads.append(name)
        return read(store, name, path)

    monkeypatch.setattr(AdapterStore, "_read", counted)
    made = engine()
    made.load_adapter("x", shutil.copytree(paths[0], tmp_path / "x"))
    shutil.rmtree(tmp_path / "x")
    for number in range(3):
        assert answer(made, under("x", TOKENS, name=f"r{number}")) == alone["a0"]
    assert reads == ["x"]


def test_03_keys_and_values_are_reused_across_adapters(paths: list[Path], alone: dict[str, list[int]]) -> None:
    """The same prompt under other adapters, other weights and the base is computed anew each time, and found again only by its own kind."""
    made = engine()
    for path in paths:
        made.load_adapter(path.name, path)
    mixes: list[Mix] = [(), *(((path.name, 1.0),) for path in paths), (("a0", 0.5),), (("a0", 0.5), ("a2", 0.5))]
    first = [answer(made, greedy(6, mix)) for mix in mixes]
    assert made.metrics().cached_tokens == 0
    assert first[:5] == [alone[name][:6] for name in ("", "a0", "a1", "a2", "a3")]
    assert [answer(made, greedy(6, mix)) for mix in mixes] == first
    assert made.metrics().cached_tokens == len(mixes) * 16


def test_04_weight_zero_is_not_zero(paths: list[Path], alone: dict[str, list[int]]) -> None:
    """An adapter with weight 0 changes nothing, its weights not finite included: the base answers, from the base's blocks."""
    made = engine()
    assert made.bank is not None
    made.bank.add("bad", DoRA(r=2))
    for parameter in made.bank["bad"].requires_grad_(False).parameters():
        parameter.fill_(float("nan"))
    made = Engine(made.model, made.tokenizer, made.bank, EngineLimits(context=128))
    made.load_adapter("x", paths[1])
    assert answer(made, greedy(TOKENS)) == alone[""]
    assert answer(made, greedy(TOKENS, (("bad", 0.0),))) == alone[""]
    assert answer(made, greedy(TOKENS, (("bad", 0.0), ("x", 1.0)))) == alone["a1"]
    assert made.metrics().cached_tokens == 16
    with pytest.raises(AdapterError, match="no adapter is named"):
        made.submit(greedy(2, (("none", 0.0),)))


@pytest.mark.parametrize(
    "target",
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"],
)
def test_05_an_adapter_is_ignored(target: str, tmp_path: Path) -> None:
    """An adapter on any one kind of layer answers as transformers does with the merged weights, and not as the base."""
    source = attach(tiny("llama", tie_word_embeddings=False))
    source.add("x", LoRA(r=4, target_modules=[target]))
    randomised(source, "x", 3)
    source.save("x", tmp_path / "x")
    merged = tiny("llama", tie_word_embeddings=False)
    merged.load_state_dict(source.merged_state_dict("x"))
    made = engine(tie_word_embeddings=False)
    made.load_adapter("x", tmp_path / "x")
    assert answer(made, under("x")) == generated(merged, 8) != answer(made, greedy())


def test_06_the_first_requests_adapter_is_used_for_the_others(paths: list[Path], alone: dict[str, list[int]]) -> None:
    """Requests that run in the same steps each have their own adapter, sampling and length, whichever came first."""
    made = engine()
    for path in paths:
        made.load_adapter(path.name, path)
    names = ["a2", "", "a0", "a3", "a1", "", "a2"]
    asked = [greedy(TOKENS - i, ((name, 1.0),) if name else (), name=f"r{i}") for i, name in enumerate(names)]
    streams = [made.submit(one) for one in asked]
    warm = made.submit(GenerationRequest("w", PROMPT, (), SamplingParams(max_tokens=TOKENS, temperature=2.0, seed=1)))
    while made.step():
        pass
    for i, (name, stream) in enumerate(zip(names, streams, strict=True)):
        assert tokens(list(stream)) == alone[name][: TOKENS - i]
    assert tokens(list(warm)) != alone[""]


def test_07_unloading_hangs_after_a_request_with_several_choices(
    paths: list[Path], alone: dict[str, list[int]]
) -> None:
    """An adapter is unloaded at once while three choices of one prompt run with it and when they have ended."""
    made = engine()
    made.load_adapter("x", paths[0])
    sampling = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, choice=choice) for choice in range(3)]
    streams = [made.submit(GenerationRequest(f"c{i}", PROMPT, (("x", 1.0),), one)) for i, one in enumerate(sampling)]
    made.step()
    made.unload_adapter("x")
    while made.step():
        pass
    assert [tokens(list(stream)) for stream in streams] == [alone["a0"]] * 3
    assert made.bank is not None and made.bank.names == [] and made.adapters() == []


def test_08_unloading_leaves_memory(paths: list[Path]) -> None:
    """Of adapters that were loaded, used, replaced and unloaded, no tensor is left."""
    made = engine()
    left: list[weakref.ref[Any]] = []
    for number in range(6):
        made.load_adapter("x", paths[number % 2])
        made.load_adapter("y", paths[2])
        answer(made, greedy(3, (("x", 0.5), ("y", 0.5))))
        answer(made, under("x", 3))
        left += [weakref.ref(p) for one in made._store._versions if one.adapter for p in one.adapter.parameters()]
        made.unload_adapter("y")
        made.step()
    made.unload_adapter("x")
    made.step()
    answer(made, greedy(3))
    gc.collect()
    assert len(left) > 100 and not [one for one in left if one() is not None]
    assert made._store._versions == [] and made.bank is not None and made.bank.names == []


def test_09_unloaded_while_in_flight(paths: list[Path], alone: dict[str, list[int]]) -> None:
    """Requests that run or wait when their adapter is unloaded or replaced end with it, and only new ones are refused."""
    made = engine(limits=EngineLimits(context=128, scheduler=SchedulerLimits(running=2)))
    made.load_adapter("x", paths[0])
    made.load_adapter("y", paths[1])
    streams = [made.submit(under(name, TOKENS, name=f"{name}{i}")) for i in range(2) for name in ("x", "y")]
    made.step()
    made.unload_adapter("x")
    made.load_adapter("y", paths[2])
    with pytest.raises(AdapterError, match='no adapter is named "x"; there are: y'):
        made.submit(under("x"))
    newest = made.submit(under("y", TOKENS, name="new"))
    while made.step():
        pass
    assert [tokens(list(stream)) for stream in streams] == [alone["a0"], alone["a1"]] * 2
    assert tokens(list(newest)) == alone["a2"]
    assert made.bank is not None and [name.split(".")[0] for name in made.bank.names] == ["y"]


def test_10_a_load_is_reported_and_the_adapter_never_answers(server: Running, adapters: Path, place: Path) -> None:
    """When a load has been answered, the model is listed and answers; a folder that does not load is an error and is not listed."""
    with server.http(ADMIN_KEY) as admin, server.client() as client:
        write_adapters(place / "base", adapters, {"late": LoRA(r=3)})
        assert "late" not in {model.id for model in client.models.list()}
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "late"}).json()["loaded"] is True
        assert "late" in {model.id for model in client.models.list()}
        assert client.chat.completions.create(model="late", messages=HELLO, max_tokens=2).usage
        shutil.copytree(adapters / "late", adapters / "broken")
        (adapters / "broken" / "adapter_model.safetensors").write_bytes(b"broken")
        refused = admin.post("/v1/load_lora_adapter", json={"lora_name": "broken"})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "adapter_not_loadable"
        assert "broken" not in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.completions.create(model="broken", prompt="a")


def test_11_the_first_load_blocks_the_others(
    paths: list[Path], alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one adapter is loaded, and another is read again since it had left memory, requests of the others are answered."""
    go, read = threading.Event(), AdapterStore._read
    slow: set[str] = set()

    def held_up(store: AdapterStore, name: str, path: Path) -> Any:
        assert name not in slow or go.wait(30)
        return read(store, name, path)

    monkeypatch.setattr(AdapterStore, "_read", held_up)
    made = engine(limits=EngineLimits(context=128, adapters=AdapterLimits(in_bank=1, in_memory=1)))
    for name, path in zip("xyz", paths, strict=False):
        made.load_adapter(name, path)
        answer(made, under(name, 2))
    assert {one.name: one.place for one in made.adapters()}["x"] == "disk"
    slow |= {"x", "w"}
    loading = threading.Thread(target=made.load_adapter, args=("w", paths[3]))
    loading.start()
    waiting = made.submit(under("x", TOKENS, name="waits"))
    for _ in range(3):
        assert answer(made, under("z", TOKENS)) == alone["a2"] and answer(made, greedy(TOKENS)) == alone[""]
    assert waiting.poll() is None and loading.is_alive()
    go.set()
    loading.join()
    while made.metrics().waiting or made.metrics().running:
        made.step()
    assert tokens(list(waiting)) == alone["a0"]


class _Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_12_requests_of_the_base_are_slower_with_adapters_loaded(paths: list[Path]) -> None:
    """A step of the base has the same operations with no adapter and with four beside the layers; one of four adapters has at most
    half as many more as one of a single adapter."""

    def operations(made: Engine, mixes: list[Mix]) -> int:
        for _ in range(2):  # the first time fills caches
            streams = [made.submit(greedy(4, mix, name=f"r{i}")) for i, mix in enumerate(mixes)]
            made.step()
            made.step()
            with _Operations() as found:
                made.step()
            while made.step():
                pass
            assert all(last(list(stream)).reason == "length" for stream in streams)
        return found.count

    empty, full = engine(), engine()
    for i, path in enumerate([paths[0]] * 4):
        full.load_adapter(f"a{i}", path)
        answer(full, under(f"a{i}", 2))
    assert full.bank is not None and full.bank.names
    assert operations(full, [()] * 4) == operations(empty, [()] * 4)
    four: list[Mix] = [((f"a{i}", 1.0),) for i in range(4)]
    assert operations(full, four) <= 1.5 * operations(full, [four[0]] * 4)


def test_13_one_adapters_load_starves_another(paths: list[Path]) -> None:
    """Beside forty requests of one adapter, a request of another has its first token within the steps that the scheduler states."""
    limits = SchedulerLimits(running=4, patience=4)
    made = engine(limits=EngineLimits(context=128, scheduler=limits))
    made.load_adapter("busy", paths[0])
    made.load_adapter("quiet", paths[1])
    for number in range(40):
        made.submit(under("busy", 60, name=f"b{number}"))
    for _ in range(8):
        made.step()
    quiet = made.submit(under("quiet", 5, name="q"))
    begun = made.metrics().steps
    while (event := quiet.poll()) is None:
        made.step()
    assert tokens([event]) and made.metrics().steps - begun <= limits.patience + 2
    made.stop()


def test_14_metrics_do_not_say_which_adapters_are_resident(paths: list[Path]) -> None:
    """Each adapter has a label of its own for its place, its tokens and its waiting requests; beyond a bound they are counted as one."""
    made = engine(limits=EngineLimits(context=128, adapters=AdapterLimits(in_bank=2)))
    metrics = ServeMetrics(made, Counter)
    for path in paths:
        made.load_adapter(path.name, path)
    for name in ("a0", "a1", "a2"):
        answer(made, under(name, 3))
    made.submit(under("a3", name="waits"))
    lines = metrics.text().decode().splitlines()
    resident = {line for line in lines if line.startswith("veneer:adapter_resident{")}
    assert resident == {f'veneer:adapter_resident{{adapter="a{i}"}} {float(i in (1, 2))}' for i in range(4)}
    assert 'veneer:generation_tokens_total{adapter="a2"} 3.0' in lines
    assert 'veneer:lora_requests_waiting{adapter="a3"} 1.0' in lines
    for number in range(MAX_LABELS + 20):
        made.load_adapter(f"n{number}", paths[0])
    text = metrics.text().decode()
    assert text.count("veneer:adapter_resident{") == MAX_LABELS + 1 and 'adapter_resident{adapter="other"}' in text


@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(r=4), LoRA(r=4, lora_alpha=48, use_rslora=True)])
def test_15_dora_scales_and_mixes_are_refused_or_wrong(method: Any, tmp_path: Path) -> None:
    """An adapter of any method and scale, and a weighted mix, answer as transformers does with the merged weights."""
    made = engine()
    source = attach(tiny("llama"))
    for name in ("x", "y"):
        source.add(name, method, seed=len(name))
        randomised(source, name, ord(name))
        source.save(name, tmp_path / name)
        made.load_adapter(name, tmp_path / name)
    for mix in ((("x", 1.0),), (("x", 0.6), ("y", 0.7))):
        merged = tiny("llama")
        merged.load_state_dict(source.merged_state_dict(dict(mix)))
        assert answer(made, greedy(10, mix)) == generated(merged, 10)


def test_16_every_rank_is_padded_to_the_largest(tmp_path: Path) -> None:
    """Small adapters keep their own size beside a large one, and are not computed in one padded product with it."""
    source = attach(tiny("llama"))
    ranks = {"large": 128, **{f"small{i}": 2 for i in range(7)}}
    for name, rank in ranks.items():
        source.add(name, LoRA(r=rank), seed=1)
        source.save(name, tmp_path / name)
    made = engine()
    for name in ranks:
        made.load_adapter(name, tmp_path / name)
    bytes_of = {one.name: one.bytes for one in made.adapters()}
    assert bytes_of["large"] == 64 * bytes_of["small0"]
    streams = [made.submit(under(name, 3, name=name)) for name in ranks]
    while made.step():
        pass
    assert all(last(list(stream)).reason == "length" for stream in streams)
    one = Assignment("x", torch.tensor([0]), 1.0, None, "")
    groups = by_rank([(rank, one) for rank in ranks.values()], width=2 * 576)
    assert sorted(map(len, groups)) == [1, 7]


def test_17_a_saved_template_loses_its_generation_prompt(tmp_path: Path) -> None:
    """Prompts of an adapter are rendered with the template that it was trained with, up to the beginning of the answer."""
    source = attach(tiny("llama"))
    source.add("x", LoRA(r=2))
    source.save("x", tmp_path / "x", template=NAMED_TEMPLATES["chatml-tools"])
    made = engine()
    template = made.load_adapter("x", tmp_path / "x").template
    renderer = PromptRenderer(tiny_tokenizer(), ServeLimits())
    messages = [ChatMessage(role="user", content="Weather?")]
    assert template is not None
    text = renderer.chat(messages, template=template).text
    assert text.startswith("<|im_start|>user\nWeather?") and text.endswith("<|im_start|>assistant\n")
    whole = renderer.chat(messages, template=template, prompt=False).text
    assert text == whole + "<|im_start|>assistant\n"
    assert renderer.chat(messages).ids != renderer.chat(messages, template=template).ids


def test_18_a_client_that_disconnects_keeps_the_engine_busy_and_harms_others(server: Running) -> None:
    """Of ten streams that are closed in the middle, nothing runs a moment later, and a stream beside them has its whole answer."""
    with server.client() as client:
        asked: Any = {"messages": HELLO, "temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
        expected = [
            chunk.choices[0].delta.content
            for chunk in client.chat.completions.create(model="sql", max_tokens=60, **asked)
        ]
        before = server.engine.metrics()
        beside = client.chat.completions.create(model="sql", max_tokens=60, **asked)
        found = [next(iter(beside)).choices[0].delta.content]
        for i in range(10):
            stream = client.chat.completions.create(model=("base", "style", "tone")[i % 3], max_tokens=200, **asked)
            next(iter(stream))
            stream.close()
        found += [chunk.choices[0].delta.content for chunk in beside]
        assert "".join(piece or "" for piece in found) == "".join(piece or "" for piece in expected)
        wait(server.idle, 5)
        after = server.engine.metrics()
        assert after.free_blocks == after.blocks
        assert after.finished["cancelled"] - before.finished.get("cancelled", 0) >= 5
        assert all(one.running == one.waiting == 0 for one in server.engine.adapters())


def test_19_a_request_that_cannot_begin_blocks_the_queue_behind_it(
    paths: list[Path], alone: dict[str, list[int]]
) -> None:
    """A long prompt that waits for blocks is passed by, and begins in the end."""
    limits = EngineLimits(
        context=64, cache_tokens=88, block=4, scheduler=SchedulerLimits(running=4, patience=6, reserve=4)
    )
    made = engine(limits=limits)
    made.load_adapter("x", paths[0])
    running = made.submit(under("x", 20, name="runs"))
    made.step()
    long = made.submit(greedy(2, (("x", 1.0),), name="long", prompt=tuple(range(3, 63))))
    behind = made.submit(greedy(TOKENS, name="behind"))
    ended: list[str] = []
    streams = {"runs": running, "long": long, "behind": behind}
    events: dict[str, list[Any]] = {name: [] for name in streams}
    while len(ended) < 3:
        made.step()
        for name, stream in streams.items():
            while (event := stream.poll()) is not None:
                events[name].append(event)
                if isinstance(event, Finished):
                    ended.append(name)
    assert ended.index("behind") < ended.index("long")
    assert tokens(events["behind"]) == alone[""] and tokens(events["runs"])[:TOKENS] == alone["a0"]
    assert events["long"][-1].reason == "length"


@pytest.mark.parametrize(
    "name", ["/etc", "../adapters/sql", "https://example.org/a", "organisation/model", "sql\0", "./sql"]
)
def test_20_a_client_loads_any_model(server: Running, name: str) -> None:
    """Paths, addresses and names of hubs are names that nothing has, as model, in a mix and with the admin key, and nothing is opened."""
    with server.client() as client:
        before = [one.name for one in server.engine.adapters()]
        for ask in (
            lambda: client.completions.create(model=name, prompt="a"),
            lambda: client.completions.create(model="base", prompt="a", extra_body={"adapters": [{"name": name}]}),
            lambda: client.models.retrieve(name),
            lambda: client.fine_tuning.jobs.create(model=name, training_file="file-x"),
        ):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as error:
                ask()
            assert error.value.param or error.value.code
        with server.http(ADMIN_KEY) as admin:
            assert admin.post("/v1/load_lora_adapter", json={"lora_name": name}).status_code in (400, 404)
            path = admin.post("/v1/load_lora_adapter", json={"lora_name": "sql", "lora_path": name})
            assert path.status_code == 400 and path.json()["error"]["param"] == "lora_path"
        assert [one.name for one in server.engine.adapters()] == before


def test_21_registrations_are_lost_on_restart(place: Path, tmp_path: Path) -> None:
    """Adapters that were loaded and unloaded while the server ran are so after a restart, and answer as before."""
    write_adapters(place / "base", tmp_path / "adapters", {"sql": LoRA(r=2), "tone": LoRA(r=4)})
    first = Running(place / "base", tmp_path / "state", tmp_path / "adapters")
    write_adapters(place / "base", tmp_path / "adapters", {"late": DoRA(r=2)})
    with first.http(ADMIN_KEY) as admin:
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "late"}).status_code == 200
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "tone"}).status_code == 200
    asked: Any = {"model": "late", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    with first.client() as client:
        before = client.chat.completions.create(**asked).choices[0].message.content
    first.close()
    second = Running(place / "base", tmp_path / "state", tmp_path / "adapters")
    with second.client() as client:
        assert {model.id for model in client.models.list()} == {"base", "sql", "late"}
        assert client.chat.completions.create(**asked).choices[0].message.content == before
    second.close()


def test_22_new_weights_meet_an_old_prefix() -> None:
    """An adapter that trains in this process answers with its present weights, and with nothing that its earlier ones left in the cache."""
    made = engine()
    assert made.bank is not None
    made.bank.add("x", LoRA(r=4))
    made = Engine(made.model, made.tokenizer, made.bank, EngineLimits(context=128))
    found = [answer(made, under("x"))]
    for seed in (1, 2):
        with torch.no_grad():
            draw = torch.Generator().manual_seed(seed)
            for parameter in made.bank["x"].parameters():  # as an optimizer does
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        found.append(answer(made, under("x")))
        merged = tiny("llama")
        merged.load_state_dict(made.bank.merged_state_dict("x"))
        assert found[-1] == generated(merged, 8)
    assert len({tuple(one) for one in found}) == 3 and made.metrics().cached_tokens == 0
