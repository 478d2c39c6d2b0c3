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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.errors import ConfigError, DataError

RESAMPLES = 1000


@dataclass(frozen=True)
class ScoreInterval:
    """A score and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} (95 %: {self.low:.4f} to {self.high:.4f})"


Resampled = NDArray[np.float64]
"""A score for each of R sets of resampled examples, [R]."""


def class_scores(predicted: Sequence[int], expected: Sequence[int], *, seed: int = 0) -> dict[str, ScoreInterval]:
    """Scores of predicted classes, given by number.

    The intervals are computed from the counts of each resampled set; the scores themselves are scikit-learn's.
    """
    found, gold = np.asarray(predicted, dtype=np.int64), np.asarray(expected, dtype=np.int64)
    values = score_values("classification", found, gold)
    draws = _draws(len(found), seed)
    classes, both = np.unique(np.concatenate([found, gold]), return_inverse=True)
    count = len(classes)
    pairs = both[len(found) :] * count + both[: len(found)]
    counts_RGF = np.stack([np.bincount(pairs[draw], minlength=count * count) for draw in draws]).reshape(
        -1, count, count
    )
    resampled = dict(zip(values, _class_scores_of(counts_RGF.astype(np.float64)), strict=True))
    return {name: _interval(value, resampled[name]) for name, value in values.items()}


def number_scores(predicted: Sequence[float], expected: Sequence[float], *, seed: int = 0) -> dict[str, ScoreInterval]:
    """Scores of predicted numbers. Correlations of constant numbers are 0."""
    stats = _library("scipy.stats", "scipy")
    found, gold = np.asarray(predicted, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    values = score_values("regression", found, gold)
    draws = _draws(len(found), seed)
    found_RN, gold_RN = found[draws], gold[draws]
    resampled = {
        "pearson": _correlations(found_RN, gold_RN),
        "spearman": _correlations(stats.rankdata(found_RN, axis=1), stats.rankdata(gold_RN, axis=1)),
        "rmse": np.sqrt(((found_RN - gold_RN) ** 2).mean(1)),
    }
    return {name: _interval(value, resampled[name]) for name, value in values.items()}


def score_values(
    task: str, predicted: Sequence[float] | NDArray[Any], expected: Sequence[float] | NDArray[Any]
) -> dict[str, float]:
    """The scores of a task with a head, without intervals; the first is the task's main one."""
    found, gold = np.asarray(predicted), np.asarray(expected)
    if not len(found):
        raise DataError("there are no examples to score")
    if task == "regression":
        stats = _library("scipy.stats", "scipy")
        constant = np.ptp(found) == 0 or np.ptp(gold) == 0
        pearson, spearman = (
            0.0 if constant else float(function(found, gold).statistic)
            for function in (stats.pearsonr, stats.spearmanr)
        )
        return {"pearson": pearson, "spearman": spearman, "rmse": float(np.sqrt(((found - gold) ** 2).mean()))}
    metrics = _library("sklearn.metrics", "scikit-learn")
    return {
        "accuracy": float(metrics.accuracy_score(gold, found)),
        "f1": float(metrics.f1_score(gold, found, average="macro", zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(gold, found)),
    }


def _class_scores_of(counts_RGF: Resampled) -> tuple[Resampled, Resampled, Resampled]:
    """Accuracy, mean F1 and Matthews correlation from counts by expected and predicted class.

    Classes that a set lacks on both sides do not count in its F1. Matthews after Gorodkin (2004), which is 0 where a side is constant.
    """
    right_RC = np.diagonal(counts_RGF, axis1=1, axis2=2)
    gold_RC, found_RC = counts_RGF.sum(2), counts_RGF.sum(1)
    n_R, right_R = counts_RGF.sum((1, 2)), right_RC.sum(1)
    either_RC = gold_RC + found_RC
    f1_RC = np.divide(2 * right_RC, either_RC, out=np.zeros_like(either_RC), where=either_RC > 0)
    spread_R = np.sqrt((n_R**2 - (gold_RC**2).sum(1)) * (n_R**2 - (found_RC**2).sum(1)))
    shared_R = right_R * n_R - (gold_RC * found_RC).sum(1)
    matthews_R = np.divide(shared_R, spread_R, out=np.zeros_like(spread_R), where=spread_R > 0)
    return right_R / n_R, f1_RC.sum(1) / (either_RC > 0).sum(1), matthews_R


def _correlations(x_RN: Resampled, y_RN: Resampled) -> Resampled:
    """Pearson's correlation of each row; 0 for a constant one."""
    x_RN, y_RN = (values - values.mean(1, keepdims=True) for values in (x_RN, y_RN))
    spread_R = np.sqrt((x_RN**2).sum(1) * (y_RN**2).sum(1))
    found: Resampled = np.divide((x_RN * y_RN).sum(1), spread_R, out=np.zeros_like(spread_R), where=spread_R > 0)
    return found


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
        "bleu": _corpus_score(sacrebleu.BLEU(), answers, columns, seed),
        "rouge_l": mean_score(longest, seed=seed),
        "chrf": _corpus_score(sacrebleu.CHRF(), answers, columns, seed),
        "exact_match": mean_score(exact, seed=seed),
    }


def mean_score(values: Sequence[float], *, seed: int = 0) -> ScoreInterval:
    """The mean of one value for each example."""
    found = np.asarray(values, dtype=np.float64)
    return _interval(float(found.mean()), found[_draws(len(found), seed)].mean(1))


def _pairs(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    return zip(answers, references, strict=True)


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    """The examples of each resampled set, [R, N]."""
    if not count:
        raise DataError("there are no examples to score")
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _interval(value: float, resampled: Resampled) -> ScoreInterval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return ScoreInterval(value, float(low), float(high))


def _corpus_score(
    metric: Any, answers: Sequence[str], columns: Sequence[Sequence[str | None]], seed: int
) -> ScoreInterval:
    """A corpus score of sacrebleu; resampled sets are scored from its counts of each answer."""
    given = list(answers), [list(column) for column in columns]
    counts = np.asarray(metric._extract_corpus_statistics(*given))
    sums = (counts[draw].sum(0, keepdims=True) for draw in _draws(len(counts), seed))
    resampled = np.asarray([metric._aggregate_and_compute(total.tolist()).score for total in sums], dtype=np.float64)
    return _interval(float(metric.corpus_score(*given).score), resampled)


def _library(module: str, package: str) -> Any:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ConfigError(f"scores need {package}, which is not installed; run: pip install 'veneer[metrics]'")
    return importlib.import_module(module)
