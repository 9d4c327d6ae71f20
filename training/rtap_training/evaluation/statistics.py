"""Statistics with 95 % intervals. Pure functions.

Bootstraps resample questions, because answers to the same question are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score  # pyright: ignore  # the package has no types

from rtap_core.artifact import NUM_BINS

Floats = npt.NDArray[np.float64]
Scores = Sequence[float] | Floats
Labels = Sequence[bool] | npt.NDArray[np.bool_]

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WithinQuestion:
    """How well a score separates right from wrong answers of the **same** question.

    auroc: mean AUROC per mixed question, with a bootstrap interval over questions.
    pair_auroc: share of (right, wrong) pairs of one question in the right order; ties count half. Questions with more
        pairs weigh more.
    mixed_questions: number of questions with both right and wrong answers.
    """

    auroc: Interval
    pair_auroc: float
    mixed_questions: int


def wilson_interval(successes: int, n: int) -> Interval:
    """Share of successes with Wilson's score interval; for n = 0 the value is nan and the interval [0, 1]."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    share = successes / n
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # exact ends: rounding must not move 0 of n or n of n outside the interval
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with a normal interval from the sample standard deviation; zero width for fewer than two values."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    half = Z95 * float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return Interval(mean, mean - half, mean + half)


def global_auroc(scores: Scores, labels: Labels) -> float | None:
    """AUROC over all answers (rewards knowing which questions are hard); None if all labels agree."""
    right = np.asarray(labels, dtype=np.bool_)
    if right.all() or not right.any():
        return None
    return float(cast(float, roc_auc_score(right, np.asarray(scores))))


def within_question_auroc(
    questions: Sequence[int], scores: Scores, labels: Labels, *, seed: int = 0
) -> WithinQuestion | None:
    """Within-question AUROC of scored answers (one entry each); None if no question is mixed."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for question, score, label in zip(questions, scores, labels, strict=True):
        groups.setdefault(question, []).append((score, label))
    aurocs: list[float] = []
    pairs: list[int] = []
    for group in groups.values():
        right = sum(label for _, label in group)
        auroc = global_auroc([score for score, _ in group], [label for _, label in group])
        if auroc is not None:
            aurocs.append(auroc)
            pairs.append(right * (len(group) - right))
    if not aurocs:
        return None
    values = np.asarray(aurocs)
    means = bootstrap_weights(len(values), seed=seed) @ values / len(values)
    low, high = _percentiles(means)
    return WithinQuestion(
        Interval(float(values.mean()), low, high), float(np.average(values, weights=pairs)), len(values)
    )


def brier(scores: Scores, labels: Labels) -> float:
    """Mean squared distance between confidence and outcome; NaN without answers."""
    if not len(scores):
        return math.nan
    return float(np.mean((np.asarray(scores) - np.asarray(labels, dtype=np.float64)) ** 2))


def expected_calibration_error(scores: Scores, labels: Labels, *, bins: int = NUM_BINS) -> float:
    """Mean over equal-width bins of |mean confidence - share right|, weighted by bin size; NaN without answers.

    A score on an inner edge belongs to the upper bin, 1.0 to the last.
    """
    if not len(scores):
        return math.nan
    confidence = np.asarray(scores, dtype=np.float64)
    right = np.asarray(labels, dtype=np.float64)
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; the earliest wins a tie. None entries do not vote; None if all are None."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=lambda answer: counts[answer]) if counts else None  # max returns the first of equals


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Linear interpolation at ``x`` through unsorted points; None outside their range."""
    if not xs or not min(xs) <= x <= max(xs):
        return None
    order = np.argsort(np.asarray(xs), kind="stable")
    return float(np.interp(x, np.asarray(xs)[order], np.asarray(ys)[order]))


@lru_cache(maxsize=4)
def bootstrap_weights(n: int, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Counts of each of n questions in each resample: (resamples, n), rows sum to n. Read-only."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    weights.setflags(write=False)
    return weights


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of first - second over the same questions, interval by paired bootstrap."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n = len(differences)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    low, high = _percentiles(bootstrap_weights(n, seed=seed) @ differences / n)
    return Interval(float(differences.mean()), low, high)


def paired_ratio(first: Sequence[float] | Floats, second: Sequence[float] | Floats, *, seed: int = 0) -> Interval:
    """Sum of first over sum of second, of the same questions or rounds, interval by paired bootstrap; a single pair has
    none."""
    above, below = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    value = float(above.sum() / below.sum()) if below.sum() else math.nan
    if len(above) < 2 or not below.all():
        return Interval(value, math.nan, math.nan)
    weights = bootstrap_weights(len(above), seed=seed)
    return Interval(value, *_percentiles((weights @ above) / (weights @ below)))


def equal_cost_difference(
    curve_cost: Floats, curve_gain: Floats, cost: Sequence[float], gain: Sequence[float], *, seed: int = 0
) -> Interval | None:
    """Gain of a curve of rules over one rule at that rule's mean cost; None if that cost is beyond the curve.

    curve_cost, curve_gain: (points, questions), one row for each point of the curve; cost, gain: (questions,).
    Every resample of questions recomputes the whole curve; a cost beyond its ends takes the gain at the end.
    """
    n = curve_cost.shape[1]
    own_cost, own_gain = np.asarray(cost, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    height = interpolate(float(own_cost.mean()), list(curve_cost.mean(axis=1)), list(curve_gain.mean(axis=1)))
    if height is None:
        return None
    weights = bootstrap_weights(n, seed=seed) / n
    costs, gains = weights @ curve_cost.T, weights @ curve_gain.T  # (resamples, points)
    own_costs, own_gains = weights @ own_cost, weights @ own_gain  # (resamples,)
    order = np.argsort(costs, axis=1, kind="stable")
    costs, gains = np.take_along_axis(costs, order, axis=1), np.take_along_axis(gains, order, axis=1)
    heights = np.empty(len(weights), dtype=np.float64)
    for i, (xs, ys) in enumerate(zip(costs, gains, strict=True)):
        heights[i] = np.interp(own_costs[i], xs, ys)
    low, high = _percentiles(heights - own_gains)
    return Interval(height - float(own_gain.mean()), low, high)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
