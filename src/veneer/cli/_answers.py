"""Generated answers on the command line, scored against those of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import counting
from veneer.errors import DataError

if TYPE_CHECKING:
    from veneer.cli._targets import LoadedTargets
    from veneer.serve.generation import TextGenerator


@status("reading the prompts")
def prompts_of(file: str, format: str, columns: dict[str, str], *, chats: bool) -> dict[str, tuple[Any, list[str]]]:
    """Return {key: (prompt, references)} of the rows that end with an answer; rows with the same prompt give one prompt.

    Args:
        file: the rows.
        format: their format.
        columns: our column names to the file's.
        chats: prompts are conversations, and not plain text.

    Raises:
        DataError: No row has an answer, or a row cannot be used.
    """
    from veneer.data.dataset import LoadReport
    from veneer.data.rows.row import BadRow
    from veneer.data.rows.shapes import RowReader

    found: dict[str, tuple[Any, list[str]]] = {}
    report = LoadReport()
    for row in RowReader(file, format=format, columns=columns):
        report.rows += 1
        if isinstance(row, BadRow):
            report.refuse(row)
            continue
        *before, last = row.messages or ({},)
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            continue
        prompt: Any = before if chats else row.prompt
        if prompt:
            found.setdefault(repr(prompt), (prompt, []))[1].append(last["content"])
    report.raise_if_bad()
    if not found:
        raise DataError(f"{file}: no row has a prompt and an answer, so there is nothing to generate and score")
    return found


def score_answers(
    loaded: LoadedTargets, routes: Mapping[str, Any], prompts: list[tuple[Any, list[str]]], max_tokens: int
) -> dict[str, dict[str, Any]]:
    """Return BLEU, ROUGE-L, chrF and exact match of the answers of each route by its name, decoded greedily."""
    from veneer.evaluate.scores import text_scores

    generator = _generator(loaded)
    report = {}
    for name, route in routes.items():
        answers = _answers(generator, name, route, [prompt for prompt, _ in prompts], max_tokens)
        scores = text_scores(answers, [references for _, references in prompts])
        report[name] = {key: vars(score) for key, score in scores.items()}
    return report


def answer_lines(report: dict[str, dict[str, Any]], count: int) -> list[str]:
    """Return the scores as lines."""
    width = max(map(len, report))
    lines = [f"answers to {count} prompts; 95 % intervals over resampled prompts"]
    for name, scores in report.items():
        told = (f"{key} {one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for key, one in scores.items())
        lines.append(f"  {name:<{width}}  {'  '.join(told)}")
    return lines


def _generator(loaded: LoadedTargets) -> TextGenerator:
    from veneer.serve.generation import TextGenerator

    return TextGenerator(loaded.base.model, loaded.base.tokenizer, loaded.bank)


def _answers(generator: TextGenerator, name: str, route: Any, prompts: list[Any], max_tokens: int) -> list[str]:
    from veneer.serve.engine.request import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    with counting(f"answering with {name}", len(prompts), "prompts") as show:
        return generator.write_many(prompts, route, sampling, progress=show)
