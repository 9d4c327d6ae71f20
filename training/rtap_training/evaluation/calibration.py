"""Metrics and calibration of a confidence generator. Scores are arrays over cycles.

The main metric is the within-question AUROC: the chance that a right cycle scores above a wrong one of the same
question. A generator that only knows which questions are hard has a fair global AUROC and is useless for stopping.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit  # pyright: ignore  # comes with scikit-learn
from sklearn.linear_model import LogisticRegression  # pyright: ignore  # the package has no types

from rtap_core.artifact import NUM_BINS, Logistic
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.evaluation import statistics as stats
from rtap_training.evaluation.statistics import Floats

Bools = NDArray[np.bool_]
FOLDS = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """Metrics of a generator. AUROCs are None without contrast.

    within_auroc: mean over the ``contrast_questions`` questions that have both right and wrong cycles. intervals: 95 %,
    by bootstrap over questions, as cycles of one question are not independent. That of the calibration error lies high:
    noise biases it upwards.
    """

    within_auroc: float | None
    contrast_questions: int
    global_auroc: float | None
    ece: float
    brier: float
    cycles: int
    right_share: float
    intervals: dict[str, tuple[float, float]]


def figures(scores: Floats, labels: Bools, questions: Sequence[int]) -> Figures:
    """All metrics, rounded for a report."""
    within, overall = stats.within_question_auroc(questions, scores, labels), stats.global_auroc(scores, labels)
    _, place = np.unique(np.asarray(questions), return_inverse=True)
    cycles, errors = np.bincount(place).astype(np.float64), scores - labels
    gaps = np.zeros((len(cycles), NUM_BINS))
    np.add.at(gaps, (place, stats.bins_of(scores)), errors)
    draws = stats.bootstrap_weights(len(cycles), seed=0)
    brier = stats.paired_ratio(np.bincount(place, weights=errors**2).astype(np.float64), cycles)
    ends = {
        "ece": stats.percentiles(np.abs(draws @ gaps).sum(axis=1) / (draws @ cycles)),
        "brier": (brier.low, brier.high),
    }
    if within is not None:
        ends["within_auroc"] = (within.auroc.low, within.auroc.high)
    return Figures(
        within_auroc=None if within is None else round(within.auroc.value, 4),
        contrast_questions=0 if within is None else within.mixed_questions,
        global_auroc=None if overall is None else round(overall, 4),
        ece=round(stats.expected_calibration_error(scores, labels), 4),
        brier=round(brier.value, 4),
        cycles=len(scores),
        right_share=round(float(labels.mean()), 4),
        intervals={name: (round(low, 4), round(high, 4)) for name, (low, high) in ends.items()},
    )


def fit_logistic(features: Floats, labels: Bools) -> list[float]:
    """Bias and weights of a logistic regression on features (N, F). The penalty only separates collinear features.

    Targets are smoothed as in Platt (1999), so the weights stay finite on separable data: each row counts as right and
    as wrong, weighted by its target.
    """
    num_right, num_wrong = int(labels.sum()), int((~labels).sum())
    targets = np.where(labels, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    model: Any = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000)
    rows, both = np.concatenate([features, features]), np.repeat([True, False], len(features))
    model.fit(rows, both, sample_weight=np.concatenate([targets, 1 - targets]))
    return [float(model.intercept_[0]), *model.coef_[0].tolist()]


Seen = tuple[float, LogprobFeatures | None]
"""(generator's score, log-probability features) of a cycle."""


def fit_confidence(seen: Sequence[Seen], labels: Bools, names: Sequence[str]) -> Logistic:
    """The logistic regression on the features ``names`` of these cycles, rounded for a config."""
    inputs = [Logistic.inputs(*one) for one in seen]
    weights = fit_logistic(np.array([[row[name] for name in names] for row in inputs]), labels)
    return Logistic(**{name: round(w, 4) for name, w in zip(("bias", *names), weights, strict=True)})


def cross_validated(features: Floats, labels: Bools, questions: Sequence[int]) -> Floats:
    """Probability of each row by a regression on the rows of other questions, ten parts at most.

    Raises ConfigError if a part would be fitted to right or wrong rows alone."""
    _, place = np.unique(np.asarray(questions), return_inverse=True)
    part = place % FOLDS
    scores = np.zeros(len(labels))
    for number in np.unique(part):
        fitted, left_out = part != number, part == number
        if len(np.unique(labels[fitted])) < 2:
            raise ConfigError("right or wrong samples are of too few questions to cross-validate; give more questions")
        bias, *weights = fit_logistic(features[fitted], labels[fitted])
        scores[left_out] = expit(bias + features[left_out] @ np.array(weights))
    return scores


def best_threshold(scores: Floats, labels: Bools) -> float:
    """The threshold, to a hundredth, that best separates right from wrong (largest balanced accuracy)."""
    grid = np.arange(5, 96) / 100
    balanced = [float((scores[labels] >= t).mean() + (scores[~labels] < t).mean()) for t in grid]
    best = np.flatnonzero(np.array(balanced) >= max(balanced) - 1e-9)
    return round(float(grid[best[len(best) // 2]]), 2)


def histogram(scores: Floats) -> list[float]:
    """Share of scores in each equal-width bin of [0, 1]."""
    counts, _ = np.histogram(scores, bins=NUM_BINS, range=(0.0, 1.0))
    return [round(float(c) / max(1, len(scores)), 5) for c in counts]
