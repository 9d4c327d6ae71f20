"""Metrics and calibration of a confidence generator. Pure numpy; scores are arrays over cycles.

The main metric is the within-question AUROC: the chance that a right cycle scores above a wrong one of the same
question. A generator that only knows which questions are hard has a fair global AUROC and is useless for stopping.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtap_core.artifact import NUM_BINS
from rtap_core.errors import ConfigError
from rtap_training.evaluation.statistics import bootstrap_weights

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
BOOTSTRAPS = 1000
FOLDS = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """Metrics of a generator. AUROCs are None without contrast.

    within_auroc: mean over the ``contrast_questions`` questions that have both right and wrong cycles.
    """

    within_auroc: float | None
    contrast_questions: int
    global_auroc: float | None
    ece: float
    brier: float
    cycles: int
    right_share: float


def auroc(scores: Floats, labels: Bools) -> float:
    """P(a right cycle scores above a wrong one); ties count half; NaN without contrast."""
    num_right, num_wrong = int(labels.sum()), int((~labels).sum())
    if not num_right or not num_wrong:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks = (last_rank - (counts - 1) / 2)[inverse]  # ties share their mean rank
    return float((ranks[labels].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def within_question_auroc(scores: Floats, labels: Bools, questions: Sequence[int]) -> tuple[float, int]:
    """Mean AUROC over questions with contrast, and their number."""
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        rows[question].append(index)
    values = [auroc(scores[i], labels[i]) for i in rows.values() if 0 < labels[i].sum() < len(i)]
    return (float(np.mean(values)) if values else float("nan"), len(values))


def expected_calibration_error(scores: Floats, labels: Bools) -> float:
    """Mean over equal-width bins of |accuracy - confidence|, weighted by bin size."""
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(scores[bins == b].sum() - labels[bins == b].sum()) for b in range(NUM_BINS)]
    return float(sum(gaps) / len(scores))


def figures(scores: Floats, labels: Bools, questions: Sequence[int]) -> Figures:
    """All metrics, rounded for a report."""
    within, contrast = within_question_auroc(scores, labels, questions)
    return Figures(
        within_auroc=_known(within),
        contrast_questions=contrast,
        global_auroc=_known(auroc(scores, labels)),
        ece=round(expected_calibration_error(scores, labels), 4),
        brier=round(float(np.mean((scores - labels) ** 2)), 4),
        cycles=len(scores),
        right_share=round(float(labels.mean()), 4),
    )


def intervals(scores: Floats, labels: Bools, questions: Sequence[int], *, seed: int = 0) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the metrics. Questions are resampled: cycles of one question are not independent.

    The calibration error is biased upwards by noise, so its interval lies high.
    """
    names, place = np.unique(np.asarray(questions), return_inverse=True)
    num_questions = len(names)
    draws = bootstrap_weights(num_questions, seed=seed, resamples=BOOTSTRAPS)  # (R, Q)
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    errors = scores - labels
    gaps = np.bincount(place * NUM_BINS + bins, weights=errors, minlength=num_questions * NUM_BINS)
    cycles = draws @ np.bincount(place)
    by_question = np.array([auroc(scores[place == q], labels[place == q]) for q in range(num_questions)])
    is_mixed = ~np.isnan(by_question)
    mixed = draws @ is_mixed
    with np.errstate(invalid="ignore"):  # a resample without a mixed question has no within-question AUROC
        within = draws @ np.where(is_mixed, by_question, 0.0) / mixed
    _, level = np.unique(scores, return_inverse=True)
    drawn: dict[str, Floats] = {
        "within_auroc": within,
        "global_auroc": np.array([_weighted_auroc(level, labels, row[place]) for row in draws]),
        "ece": np.abs(draws @ gaps.reshape(num_questions, NUM_BINS)).sum(axis=1) / cycles,
        "brier": draws @ np.bincount(place, weights=errors**2) / cycles,
    }
    ends = {name: np.nanpercentile(v, [2.5, 97.5]).tolist() for name, v in drawn.items() if not np.isnan(v).all()}
    return {name: [round(low, 4), round(high, 4)] for name, (low, high) in ends.items()}


def _weighted_auroc(level: NDArray[np.intp], labels: Bools, weights: Floats) -> float:
    """AUROC of weighted cycles, scored by rank; NaN without contrast."""
    right, wrong = np.bincount(level, weights=weights * labels), np.bincount(level, weights=weights * ~labels)
    pairs = right.sum() * wrong.sum()
    return float((right * (wrong.cumsum() - wrong / 2)).sum() / pairs) if pairs else float("nan")


def _known(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def sigmoid(logits: Floats) -> Floats:
    """Sigmoid that does not overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def fit_platt(logits: Floats, labels: Bools) -> tuple[float, float]:
    """(slope, offset) that minimise the cross-entropy of sigmoid(slope·logit + offset); damped Newton steps.

    Targets are smoothed as in Platt (1999), so the slope stays finite on separable data.
    """
    slope, offset = fit_logistic(np.stack([logits, np.ones_like(logits)], axis=1), labels, np.array([1.0, 0.0]))
    return float(slope), float(offset)


def fit_logistic(features: Floats, labels: Bools, start: Floats, *, steps: int = 100) -> Floats:
    """Weights (F,) that minimise the cross-entropy of sigmoid(features @ weights); features (N, F). See fit_platt."""
    num_right, num_wrong = int(labels.sum()), int((~labels).sum())
    targets = np.where(labels, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))

    def cross_entropy(weights: Floats) -> float:
        margins = features @ weights
        return float(np.mean(np.logaddexp(0, margins) - targets * margins))

    weights = start
    for _ in range(steps):
        probabilities = sigmoid(features @ weights)
        gradient = features.T @ (probabilities - targets)
        spread = probabilities * (1 - probabilities)
        hessian = features.T @ (features * spread[:, None]) + 1e-6 * np.eye(len(start))
        move: Floats = np.asarray(np.linalg.solve(hessian, gradient), dtype=np.float64)
        size = 1.0
        while cross_entropy(weights - size * move) > cross_entropy(weights) and size > 1e-9:
            size /= 2  # a full Newton step overshoots where the sigmoid is flat
        weights = weights - size * move
    return weights


def fit_features(features: Floats, labels: Bools) -> list[float]:
    """Bias and weights of a logistic regression on features (N, F)."""
    columns: Floats = np.column_stack([np.ones(len(features)), features])
    return fit_logistic(columns, labels, np.zeros_like(columns[0])).tolist()


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
        bias, *weights = fit_features(features[fitted], labels[fitted])
        scores[left_out] = sigmoid(bias + features[left_out] @ np.array(weights))
    return scores


def constant_direction(hidden: Floats, *, ridge: float = 1e-3) -> Floats:
    """The direction u with hidden @ u as close to 1 as possible on every row; hidden (N, D), result (D,).

    ``…ForSequenceClassification`` heads have no bias, so an offset can only be folded in along such a direction.
    """
    gram = hidden.T @ hidden / len(hidden) + ridge * np.eye(hidden.shape[1])
    return np.asarray(np.linalg.solve(gram, hidden.mean(axis=0)), dtype=np.float64)


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
