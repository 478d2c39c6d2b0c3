"""Scores of predictions with bootstrap intervals, computed by scikit-learn, SciPy, sacrebleu and rouge-score.

    class_scores(predicted, expected)     accuracy, f1 (mean over the classes), matthews
    number_scores(predicted, expected)    pearson, spearman, rmse
    text_scores(answers, references)      bleu, rouge_l, chrf, exact_match

An interval holds the middle 95 % of the scores of resampled examples (Efron's percentile method). Accuracies, F1, ROUGE-L and exact match
are fractions; BLEU and chrF are percentages, as sacrebleu prints them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.errors import ConfigError, DataError

RESAMPLES = 1000
Values = Sequence[float] | NDArray[Any]


@dataclass(frozen=True)
class ScoreInterval:
    """A score and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} (95 %: {self.low:.4f} to {self.high:.4f})"


Metric = Callable[[NDArray[Any], NDArray[Any]], float]


def class_scores(predicted: Sequence[int], expected: Sequence[int], *, seed: int = 0) -> dict[str, ScoreInterval]:
    """Scores of predicted classes, given by number."""
    return _scores("classification", predicted, expected, seed)


def number_scores(predicted: Sequence[float], expected: Sequence[float], *, seed: int = 0) -> dict[str, ScoreInterval]:
    """Scores of predicted numbers. Correlations of constant numbers are 0."""
    return _scores("regression", predicted, expected, seed)


def score_values(task: str, predicted: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """The scores of a task with a head, without intervals; the first is the task's main one."""
    found, gold = np.asarray(predicted), np.asarray(expected)
    return {name: metric(found, gold) for name, metric in _metrics(task, found, gold).items()}


def _scores(task: str, predicted: Sequence[float], expected: Sequence[float], seed: int) -> dict[str, ScoreInterval]:
    found, gold = np.asarray(predicted), np.asarray(expected)
    return {name: _interval(metric, found, gold, seed) for name, metric in _metrics(task, found, gold).items()}


def _metrics(task: str, found: NDArray[Any], gold: NDArray[Any]) -> dict[str, Metric]:
    if task == "regression":
        stats = _library("scipy.stats", "scipy")
        return {
            "pearson": _correlation(stats.pearsonr),
            "spearman": _correlation(stats.spearmanr),
            "rmse": lambda found, gold: float(np.sqrt(((found - gold) ** 2).mean())),
        }
    metrics = _library("sklearn.metrics", "scikit-learn")
    classes = np.union1d(found, gold)
    f1 = partial(metrics.f1_score, labels=classes, average="macro", zero_division=0.0)
    return {
        "accuracy": lambda found, gold: float((found == gold).mean()),
        "f1": lambda found, gold: float(f1(gold, found)),
        "matthews": lambda found, gold: float(metrics.matthews_corrcoef(gold, found)),
    }


def _correlation(function: Any) -> Metric:
    def of(found: NDArray[Any], gold: NDArray[Any]) -> float:
        return 0.0 if np.ptp(found) == 0 or np.ptp(gold) == 0 else float(function(found, gold).statistic)

    return of


def text_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], *, seed: int = 0
) -> dict[str, ScoreInterval]:
    """Scores of generated answers. ``references``: one or more for each answer, of which the best counts for ROUGE-L and exact match."""
    sacrebleu = _library("sacrebleu.metrics", "sacrebleu")
    rouge = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])
    most = max(len(known) for known in references)
    columns = [[known[at] if at < len(known) else None for known in references] for at in range(most)]
    longest = [
        max(rouge.score(known, answer)["rougeL"].fmeasure for known in every)
        for answer, every in _pairs(answers, references)
    ]
    exact = [
        float(any(answer.strip() == known.strip() for known in every)) for answer, every in _pairs(answers, references)
    ]
    return {
        "bleu": _corpus_score(sacrebleu.BLEU(), answers, columns),
        "rouge_l": mean_score(longest, seed=seed),
        "chrf": _corpus_score(sacrebleu.CHRF(), answers, columns),
        "exact_match": mean_score(exact, seed=seed),
    }


def mean_score(values: Values, *, seed: int = 0) -> ScoreInterval:
    """The mean of one value for each example."""
    found = np.asarray(values, dtype=np.float64)
    return _interval(lambda found, _: float(found.mean()), found, found, seed)


def _pairs(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    return zip(answers, references, strict=True)


def _interval(score: Metric, found: NDArray[Any], gold: NDArray[Any], seed: int) -> ScoreInterval:
    if not len(found):
        raise DataError("there are no examples to score")
    draws = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.quantile([score(found[draw], gold[draw]) for draw in draws], [0.025, 0.975])
    return ScoreInterval(score(found, gold), float(low), float(high))


def _corpus_score(metric: Any, answers: Sequence[str], columns: Sequence[Sequence[str | None]]) -> ScoreInterval:
    """A corpus score of sacrebleu with its own bootstrap."""
    found = metric.corpus_score(list(answers), [list(column) for column in columns], n_bootstrap=RESAMPLES)
    return ScoreInterval(found.score, found._mean - found._ci, found._mean + found._ci)


def _library(module: str, package: str) -> Any:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ConfigError(f"scores need {package}, which is not installed; run: pip install 'veneer[metrics]'")
    return importlib.import_module(module)
