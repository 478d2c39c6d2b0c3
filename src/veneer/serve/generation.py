"""Text for the command line: prompts of text or messages, answered by an engine in the caller's thread.

Chat prompts go through the renderer of the data package, so control strings in a user's text stay text, as in training. Sampling has its
own random numbers: the same seed gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

from veneer.adapters import Bank
from veneer.errors import BaseModelError
from veneer.models.load import Base
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import (
    Finished,
    GenerationRequest,
    Mix,
    RequestStream,
    SamplingParams,
    TextDelta,
)
from veneer.serve.runner_record import RunnerRecord, record_of

Message = dict[str, Any]
_TOGETHER = 16
"""Prompts that are answered together."""


def text_generator(base: Base, bank: Bank | None = None) -> TextGenerator:
    """A generator for a base as it was loaded; it remembers the checks of the last start (``runner_record.py``)."""
    return TextGenerator(base.model, base.tokenizer, bank, record=record_of(base))


class TextGenerator:
    """Generates text with one model, under the adapters of a bank.

    Raises:
        BaseModelError: the base has no tokenizer, or does not generate text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank | None = None, *, record: RunnerRecord | None = None
    ) -> None:
        if not hasattr(model, "config"):
            raise BaseModelError(f"{type(model).__name__} does not generate text; use a causal language model")
        self.engine = Engine(model, tokenizer, bank, record=record)
        self.tokenizer = tokenizer
        self.renderer = self.engine.renderer
        self._numbers = count()

    @property
    def chats(self) -> bool:
        """The tokenizer has a chat template."""
        return self.renderer.template is not None

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt; see `Renderer.prompt_ids`."""
        return self.renderer.prompt_ids(prompt)

    def write(
        self,
        prompt: str | Sequence[Message],
        route: str | Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
    ) -> str:
        """Generate the complete answer to one prompt."""
        return "".join(self.stream(prompt, route, sampling))

    def write_many(
        self,
        prompts: Sequence[str | Sequence[Message]],
        route: str | Mapping[str, float] | list[str | None] | None = None,
        sampling: SamplingParams | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Generate the answers to many prompts, several in each step.

        Args:
            route: of all prompts, or a list with that of each.
            progress: called with the number of answers done.
        """
        routes = route if isinstance(route, list) else [route] * len(prompts)
        answers = [""] * len(prompts)
        running: dict[int, RequestStream] = {}
        left = iter(enumerate(prompts))
        done = 0
        while True:
            for number, prompt in islice(left, _TOGETHER - len(running)):
                running[number] = self.engine.submit(self._request(prompt, routes[number], sampling))
            if not running:
                return answers
            self.engine.step()
            for number, stream in list(running.items()):
                while (event := stream.poll()) is not None:
                    if isinstance(event, TextDelta):
                        answers[number] += event.text
                    elif isinstance(event, Finished):
                        if event.error is not None:
                            raise event.error
                        del running[number]
                        done += 1
                        if progress is not None:
                            progress(done)

    def _request(
        self, prompt: str | Sequence[Message], route: str | Mapping[str, float] | None, sampling: SamplingParams | None
    ) -> GenerationRequest:
        mix: Mix = () if route is None else ((route, 1.0),) if isinstance(route, str) else tuple(route.items())
        ids = tuple(self.prompt_ids(prompt))
        return GenerationRequest(f"text-{next(self._numbers)}", ids, mix, sampling or SamplingParams(seed=0))

    def stream(
        self,
        prompt: str | Sequence[Message],
        route: str | Mapping[str, float] | None = None,
        sampling: SamplingParams | None = None,
    ) -> Iterator[str]:
        """Generate the answer to one prompt in pieces. Ending the iteration early ends the generation."""
        for event in self.engine.run(self._request(prompt, route, sampling)):
            if isinstance(event, TextDelta) and event.text:
                yield event.text
            elif isinstance(event, Finished) and event.error is not None:
                raise event.error
