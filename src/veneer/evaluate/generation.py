"""Complete answers under a route, by transformers' ``generate``: the samples of a run, and the reference of the engine's tests.

Chat prompts go through the renderer of the data package, so control strings in a user's text stay text, as in training. Sampling has its
own random stream: the same seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from veneer.adapters import Bank
from veneer.adapters.runtime.route import Route, RouteLike
from veneer.checkpoints.receipt import stop_tokens
from veneer.data.chat.render import Renderer
from veneer.data.chat.stops import stop_ids
from veneer.errors import BaseModelError
from veneer.models.devices import device_of
from veneer.models.load import own_ends

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """Sampling options. Temperature 0 is greedy; the seed has an effect only above 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Generator:
    """Generates text with one model, under the routes of a bank."""

    def __init__(self, model: Any, tokenizer: Any, bank: Bank | None = None, renderer: Renderer | None = None) -> None:
        if tokenizer is None:
            raise BaseModelError(
                "the base has no tokenizer, so it cannot be given text; add its tokenizer's files to the folder"
            )
        if not hasattr(model, "generate"):
            raise BaseModelError(f"{type(model).__name__} does not generate text; use a causal language model")
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        self.renderer = renderer or Renderer(tokenizer)

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt; see `Renderer.prompt_ids`."""
        return self.renderer.prompt_ids(prompt)

    def write(self, prompt: str | Sequence[Message], route: RouteLike = None, sampling: Sampling | None = None) -> str:
        """Generate the complete answer to one prompt."""
        return self.complete(self.prompt_ids(prompt), route, sampling)

    def complete(self, prompt: Sequence[int], route: RouteLike = None, sampling: Sampling | None = None) -> str:
        """Generate the complete answer to a prompt of token ids."""
        ids = torch.tensor([list(prompt)], device=device_of(self.model))
        stops = self.stops(route)
        with self._routed(route), _stream(sampling or Sampling(), ids.device):
            out = self.model.generate(ids, **self._options(ids, sampling or Sampling(), stops))
        answer = [token for token in out[0, ids.shape[1] :].tolist() if token not in stops]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _routed(self, route: RouteLike) -> AbstractContextManager[object]:
        return nullcontext() if self.bank is None else self.bank.use(route, training=False)

    def stops(self, route: RouteLike = None) -> tuple[int, ...]:
        """The ids of the tokens that end an answer under a route: those that its adapters were trained with, and the base's own."""
        names = sorted({name for mix in Route.parse(route).mixes for name, _ in mix})
        recorded = [stop_tokens(self.bank[name]) for name in names] if self.bank is not None else []
        return stop_ids(self.renderer, own_ends(self.model), recorded)

    def _options(self, ids: torch.Tensor, sampling: Sampling, stops: tuple[int, ...]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "pad_token_id": self.tokenizer.eos_token_id if pad is None else pad,
            "eos_token_id": list(stops) or [-1],
        }
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        else:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        return options


@contextmanager
def _stream(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """A separate random stream for sampling; the process's own is restored afterwards."""
    drawn = sampling.temperature > 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=drawn):
        if drawn:
            torch.manual_seed(sampling.seed)
        yield
