"""Scores are those of the libraries, and their intervals those of resampled examples."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from veneer.evaluate.scores import _class_scores_of, class_scores, mean_score, number_scores, text_scores


def test_scores_of_classes_and_numbers_are_the_libraries() -> None:
    """Accuracy, mean F1, Matthews; Pearson, Spearman, RMSE; a perfect prediction has an interval without width."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 80)
    found = np.where(rng.random(80) < 0.7, gold, rng.integers(0, 3, 80))
    scores = class_scores(found.tolist(), gold.tolist())
    assert scores["accuracy"].value == pytest.approx((found == gold).mean())
    assert scores["f1"].value == pytest.approx(f1_score(gold, found, average="macro"))
    assert scores["matthews"].value == pytest.approx(matthews_corrcoef(gold, found))
    assert all(score.low < score.value < score.high for score in scores.values())
    perfect = class_scores(gold.tolist(), gold.tolist())["matthews"]
    assert (perfect.low, perfect.value, perfect.high) == (1.0, 1.0, 1.0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    numbers = number_scores(y.tolist(), x.tolist())
    assert numbers["pearson"].value == pytest.approx(pearsonr(x, y).statistic)
    assert numbers["spearman"].value == pytest.approx(spearmanr(x, y).statistic)
    assert numbers["rmse"].value == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    one = class_scores(found.tolist(), gold.tolist(), seed=4)
    draw = np.random.default_rng(4).integers(0, 80, (1000, 80))
    theirs = [(f1_score(gold[d], found[d], average="macro"), matthews_corrcoef(gold[d], found[d])) for d in draw[:20]]
    counts = np.stack([np.bincount(gold[d] * 3 + found[d], minlength=9).reshape(3, 3) for d in draw[:20]]).astype(float)
    _, f1, matthews = _class_scores_of(counts)
    assert np.allclose(f1, [pair[0] for pair in theirs]) and np.allclose(matthews, [pair[1] for pair in theirs])
    assert one["f1"].low < one["f1"].value < one["f1"].high
    assert number_scores([1.0] * 5, [1.0, 2, 3, 4, 5])["pearson"].value == 0.0


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    """Of 200 samples of a known distribution about 95 % have its mean inside their interval."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        score = mean_score(rng.normal(3.0, 1.0, 40))
        inside += score.low <= 3.0 <= score.high
    assert 180 <= inside <= 200


def test_scores_of_answers_are_the_libraries() -> None:
    """BLEU and chrF of sacrebleu with several references, ROUGE-L and exact match by the best reference."""
    answers = ["the cat sat on the mat", "a dog", "it rains in the town today"]
    references = [["the cat sat on the mat", "a cat"], ["the dog barks"], ["it is raining in the town", "rain today"]]
    found = text_scores(answers, references)
    columns = [[known[0] for known in references], ["a cat", None, "rain today"]]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, columns).score)  # type: ignore[arg-type]
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, columns).score)  # type: ignore[arg-type]
    assert found["exact_match"].value == pytest.approx(1 / 3)
    assert found["rouge_l"].value == pytest.approx((1.0 + 0.4 + 8 / 12) / 3, abs=1e-6)
    assert found["bleu"].low <= found["bleu"].value <= found["bleu"].high
