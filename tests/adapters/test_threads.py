"""One model, several threads: who may route, who sees the route, and what is said when a route ends too early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.adapters.made import nudge
from tests.adapters.peers import inputs_of
from tests.tiny import tiny, tiny_tokenizer
from torch import Tensor, nn

from veneer.adapters import Bank, DoRA, LoRA, attach
from veneer.errors import RouteError


def banked(arch: str = "llama", **overrides: Any) -> tuple[Any, Bank]:
    model: Any = tiny(arch, **overrides)
    bank = attach(model)
    nudge(bank.add("a", LoRA(r=3, lora_alpha=6), seed=1), by=0.15, seed=1)
    nudge(bank.add("b", DoRA(r=2, lora_alpha=4), seed=2), by=0.15, seed=2)
    return model, bank


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def quiet(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def test_a_second_owner_is_refused() -> None:
    """While one thread's route is open, another thread's `use` is an error; the first goes on undisturbed."""
    model, bank = banked()
    batch = inputs_of(model)

    def intrude() -> None:
        with bank.use("b"):
            quiet(model, batch)

    with bank.use("a"):
        expected = quiet(model, batch)
        with pytest.raises(RouteError, match="another thread's route is active"):
            in_thread(intrude)
        assert torch.equal(quiet(model, batch), expected)
    in_thread(intrude)


def test_worker_threads_see_the_route() -> None:
    """What the owner opened holds in threads that run inside it, and no longer than it is open."""
    model, bank = banked()
    batch = inputs_of(model)
    with bank.use(["a", None]):
        expected = quiet(model, batch)
        assert torch.equal(in_thread(lambda: quiet(model, batch)), expected)
    base = quiet(model, batch)
    assert torch.equal(in_thread(lambda: quiet(model, batch)), base)
    assert not torch.equal(base, expected)


def test_two_workers_at_once() -> None:
    """Two threads that run the model at the same time under one route, one of them training, get what each gets alone."""
    model, bank = banked()
    batches = [inputs_of(model, seed=seed) for seed in (1, 2)]
    with bank.use(["a", "b"]):
        expected = [quiet(model, batch) for batch in batches]
        barrier = threading.Barrier(2)

        def work(number: int) -> list[Tensor]:
            barrier.wait(10)
            found = []
            for _ in range(8):
                if number:
                    out = model(**batches[number]).logits
                    out.sum().backward()
                    found.append(out.detach())
                else:
                    found.append(quiet(model, batches[number]))
            return found

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(work, (0, 1)))
    for one, found in zip(expected, results, strict=True):
        assert all(torch.allclose(each, one, atol=1e-5) for each in found)


class Pausing(nn.Module):
    """A model that waits in the middle of a forward until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reached, self.go = threading.Event(), threading.Event()
        self.pause = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.pause:
            self.reached.set()
            assert self.go.wait(10)
        out: Tensor = self.second(x)
        return out


def test_leaving_the_context_under_a_running_thread_is_an_error_on_both_sides() -> None:
    """The owner is told that a thread still runs, and the thread does not go on with the base as if nothing were."""
    model = Pausing()
    bank = attach(model)
    nudge(bank.add("a", LoRA(r=2)))
    model.pause = True
    x = torch.ones(2, 4)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RouteError, match="left while another thread was still running"), bank.use("a"):  # noqa: PT012
            running = pool.submit(model, x)
            assert model.reached.wait(10)
        model.go.set()
        with pytest.raises(RouteError, match="left while this call of the model was still running"):
            running.result(10)
        # Its next call would be the base's: generation in steps must not end that way in silence.
        with pytest.raises(RouteError, match="this thread ran the model is over"):
            pool.submit(model, x).result(10)

        def on_purpose() -> Tensor:
            with bank.use(None):
                out: Tensor = model(x)
            return out

        model.pause = False
        assert torch.equal(pool.submit(on_purpose).result(10), model(x))
    with bank.use("a"):
        model(x)


def test_a_base_call_is_not_caught_by_a_route_that_opens_meanwhile() -> None:
    """A call that began without a route ends without one, whatever another thread opens in between."""
    model = Pausing()
    bank = attach(model)
    nudge(bank.add("a", LoRA(r=2)))
    x = torch.ones(2, 4)
    base = model(x)
    model.pause = True
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model, x)
        assert model.reached.wait(10)
        model.pause = False
        with bank.use("a"):
            assert not torch.equal(model(x), base)
            model.go.set()
            assert torch.equal(running.result(10), base)


GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.generate(**batch, **{**GENERATION, **options})
    return out


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "opt", "mamba"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_generation_row_by_row(arch: str, cache: bool) -> None:
    """Each row of a batch generates under its own adapter what it generates alone, with a cache and without."""
    model, bank = banked(arch)
    batch = inputs_of(model, rows=4)
    routes: list[Any] = ["a", None, "b", {"a": 0.5, "b": 0.5}]
    with bank.use(routes):
        together = generated(model, batch, use_cache=cache)
    rows = []
    for i, route in enumerate(routes):
        with bank.use(route):
            rows.append(generated(model, {"input_ids": batch["input_ids"][i : i + 1]}, use_cache=cache)[0])
    assert all(torch.equal(together[i], row) for i, row in enumerate(rows))
    assert len({tuple(row[7:].tolist()) for row in together}) > 1


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_beams_take_the_route_of_their_row(arch: str) -> None:
    """With repeat=num_beams beam search follows the rows (an encoder runs before the beams are made); without it, it is an error."""
    model, bank = banked(arch)
    batch = {"input_ids": inputs_of(model, rows=2)["input_ids"]}
    with bank.use(["a", "b"], repeat=3):
        together = generated(model, batch, num_beams=3)
    for i, name in enumerate("ab"):
        with bank.use(name):
            alone = generated(model, {"input_ids": batch["input_ids"][i : i + 1]}, num_beams=3)
        assert torch.equal(together[i], alone[0])
    with pytest.raises(RouteError, match=r"2 rows, the batch has 6.*num_beams"), bank.use(["a", "b"]):
        generated(model, batch, num_beams=3)
    with bank.use("a"):
        generated(model, batch, num_beams=3)


def test_streaming_from_a_thread() -> None:
    """Text that is generated in a thread and read outside is what generate returns under the same route."""
    from transformers import TextIteratorStreamer

    model, bank = banked()
    tokenizer = tiny_tokenizer()
    batch = inputs_of(model, rows=1)
    with bank.use("a"):
        expected = tokenizer.decode(generated(model, batch, max_new_tokens=12)[0, 7:])
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
        thread = threading.Thread(
            target=generated, args=(model, batch), kwargs={"max_new_tokens": 12, "streamer": streamer}
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == expected
    base = tokenizer.decode(generated(model, batch, max_new_tokens=12)[0, 7:])
    assert base != expected
