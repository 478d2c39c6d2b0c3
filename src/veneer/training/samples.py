"""Sample answers of a run: generated at each evaluation, from a job's own prompts or from the beginnings of its held-out examples.

    runs/a/samples/<job>.jsonl      a line for each answer: step, prompt, answer, and the expected answer where it is known

Decoding is greedy, so answers of different steps can be compared, and no random stream moves: a run with samples ends with the same
adapter as one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from veneer.adapters import Bank
from veneer.config import TrainOptions
from veneer.data.chat.render import Renderer, RenderOptions
from veneer.data.example import Example
from veneer.evaluate.generation import Generator, Sampling
from veneer.models.load import Base
from veneer.training.loop.job import Job

_TEXT_PROMPT = 32  # tokens of a text row, in which everything is trained, that are given as the prompt at most
_SHOWN = 200  # characters of a text that the console shows


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt. ``expected``: the answer in the held-out example, None for a prompt of the options."""

    prompt: str
    answer: str
    expected: str | None = None

    def lines(self) -> list[str]:
        """The sample for a console."""
        shown = [f"  prompt    {_brief(self.prompt)}"]
        if self.expected is not None:
            shown.append(f"  expected  {_brief(self.expected)}")
        return [*shown, f"  answer    {_brief(self.answer) or '(empty)'}"]


def wants_samples(job: Job) -> bool:
    """The options of a job ask for samples."""
    return asks_for_samples(job.options)


def asks_for_samples(options: TrainOptions) -> bool:
    """The options ask for samples."""
    return bool(options.samples or options.sample_prompts)


class Sampler:
    """Generates the samples of the jobs of a run.

    Raises:
        BaseModelError: the base cannot generate text.
    """

    def __init__(self, base: Base, bank: Bank, jobs: Iterable[Job]) -> None:
        self._base = base
        self._bank = bank
        self._generators: dict[str | None, Generator] = {}
        for job in jobs:
            self._generator(job.template)

    def samples(self, job: Job, progress: Callable[[int, int], None]) -> Iterator[Sample]:
        """Generate the samples of a job with its adapter as it stands. ``progress`` is called with (done, total) before each."""
        generator = self._generator(job.template)
        route, sampling = job.route or job.name, Sampling(job.options.sample_tokens)
        chosen = _spread(job, job.options.samples)
        total = len(chosen) + len(job.options.sample_prompts)
        for number, prompt in enumerate(job.options.sample_prompts):
            progress(number, total)
            yield Sample(prompt, generator.write(prompt, route, sampling))
        for number, example in enumerate(chosen, len(job.options.sample_prompts)):
            progress(number, total)
            begin, end = _answer_of(example)
            answer = generator.complete(list(example.ids[:begin]), route, sampling)
            expected = generator.tokenizer.decode(example.ids[begin:end], skip_special_tokens=True)
            yield Sample(_last_message(generator.renderer, example.ids[:begin]), answer, str(expected))

    def _generator(self, template: str | None) -> Generator:
        if template not in self._generators:
            tokenizer = self._base.tokenizer
            renderer = None if tokenizer is None else Renderer(tokenizer, RenderOptions(chat_template=template))
            self._generators[template] = Generator(self._base.model, tokenizer, self._bank, renderer)
        return self._generators[template]


def _spread(job: Job, count: int) -> list[Example]:
    """Examples that lie evenly over the held-out ones, or over those of training where nothing is held out."""
    examples = job.held_out or job.examples
    count = min(count, len(examples))
    return [examples[i * len(examples) // count].sequences[0] for i in range(count)]


def _answer_of(example: Example) -> tuple[int, int]:
    """The first trained span [i, j) of an example; of a text that is trained as a whole, the part after its beginning."""
    weights = example.weights
    begin = next((i for i, weight in enumerate(weights) if weight > 0), len(weights))
    if begin <= 1:
        begin = min(_TEXT_PROMPT, (len(weights) + 1) // 2)
    end = next((i for i in range(begin, len(weights)) if weights[i] <= 0), len(weights))
    return begin, end


def _last_message(renderer: Renderer, ids: tuple[int, ...]) -> str:
    """The text of a prompt after its last control token but those of the generation prompt; all of it where that is nothing."""
    text = renderer.encoder.decode(ids)
    pieces = [piece.strip() for piece in renderer.encoder.control_pattern.split(text.removesuffix(renderer.opening))]
    last = next((piece for piece in reversed(pieces) if piece), text.strip())
    role, _, rest = last.partition("\n")
    return rest.strip() if role.strip() in ("user", "tool", "system") and rest.strip() else last


def _brief(text: str) -> str:
    """A text in one line, its beginning only if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."
