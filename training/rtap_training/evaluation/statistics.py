"""Statistics with 95 % intervals. Pure functions.

Bootstraps resample questions, because answers to the same question are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest  # pyright: ignore  # comes with scikit-learn; neither has types
from sklearn.metrics import roc_auc_score  # pyright: ignore

from rtap_core.artifact import NUM_BINS

Floats = npt.NDArray[np.float64]
Scores = Sequence[float] | Floats
Labels = Sequence[bool] | npt.NDArray[np.bool_]

Z95 = NormalDist().inv_cdf(0.975)
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


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of confidences. confidence: their mean. right, low, high: share right, with Wilson's interval."""

    confidence: float
    right: float
    low: float
    high: float
    cycles: int


def wilson_interval(successes: int, n: int) -> Interval:
    """Share of successes with Wilson's score interval; for n = 0 the value is nan and the interval [0, 1]."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    ends: Any = binomtest(successes, n).proportion_ci(method="wilson")
    return Interval(successes / n, float(ends.low), float(ends.high))


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
    asked, score, right = np.asarray(questions), np.asarray(scores), np.asarray(labels, dtype=np.bool_)
    aurocs: list[float] = []
    pairs: list[int] = []
    for question in np.unique(asked):
        own = asked == question
        auroc = global_auroc(score[own], right[own])
        if auroc is not None:
            aurocs.append(auroc)
            pairs.append(int(right[own].sum() * (~right[own]).sum()))
    if not aurocs:
        return None
    mean = paired_difference(aurocs, [0.0] * len(aurocs), seed=seed)
    return WithinQuestion(mean, float(np.average(aurocs, weights=pairs)), len(aurocs))


def brier(scores: Scores, labels: Labels) -> float:
    """Mean squared distance between confidence and outcome; NaN without answers."""
    if not len(scores):
        return math.nan
    return float(np.mean((np.asarray(scores) - np.asarray(labels, dtype=np.float64)) ** 2))


def bins_of(scores: Scores, bins: int = NUM_BINS) -> npt.NDArray[np.int64]:
    """Equal-width bin of [0, 1] of each score. One on an inner edge belongs to the upper bin, 1.0 to the last."""
    return np.minimum((np.asarray(scores, dtype=np.float64) * bins).astype(np.int64), bins - 1)


def reliability_bins(scores: Scores, labels: Labels, *, bins: int = NUM_BINS) -> list[Bin]:
    """Non-empty bins, lowest first."""
    confidence, right, place = np.asarray(scores), np.asarray(labels), bins_of(scores, bins)
    filled: list[Bin] = []
    for number in np.unique(place):
        here = place == number
        share = wilson_interval(int(right[here].sum()), int(here.sum()))
        filled.append(Bin(float(confidence[here].mean()), share.value, share.low, share.high, int(here.sum())))
    return filled


def expected_calibration_error(scores: Scores, labels: Labels, *, bins: int = NUM_BINS) -> float:
    """Mean over bins of |mean confidence - share right|, weighted by bin size; NaN without answers."""
    if not len(scores):
        return math.nan
    gaps = np.bincount(bins_of(scores, bins), weights=np.asarray(scores) - np.asarray(labels, dtype=np.float64))
    return float(np.abs(gaps).sum() / len(scores))


@lru_cache(maxsize=4)
def bootstrap_weights(n: int, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Counts of each of n questions in each resample: (resamples, n), rows sum to n. Read-only."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    weights.setflags(write=False)
    return weights


def paired_difference(first: Scores, second: Scores, *, seed: int = 0) -> Interval:
    """Mean of first - second over the same questions, interval by paired bootstrap."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n = len(differences)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(float(differences.mean()), *percentiles(bootstrap_weights(n, seed=seed) @ differences / n))


def paired_ratio(first: Scores, second: Scores, *, seed: int = 0) -> Interval:
    """Sum of first over sum of second, of the same questions or rounds, interval by paired bootstrap; a single pair has
    none."""
    above, below = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    value = float(above.sum() / below.sum()) if below.sum() else math.nan
    if len(above) < 2 or not below.all():
        return Interval(value, math.nan, math.nan)
    weights = bootstrap_weights(len(above), seed=seed)
    return Interval(value, *percentiles((weights @ above) / (weights @ below)))


def equal_cost_difference(
    curve_cost: Floats, curve_gain: Floats, cost: Floats, gain: Floats, *, seed: int = 0
) -> Interval | None:
    """Gain of one rule over a curve of rules at the rule's mean cost; None if that cost is beyond the curve.

    curve_cost, curve_gain: (points, questions), one row for each point of the curve; cost, gain: (questions,).
    Every resample of questions recomputes the whole curve; a cost beyond its ends takes the gain at the end.
    """
    n = len(cost)
    weights = np.vstack([np.ones(n), bootstrap_weights(n, seed=seed)]) / n  # first the questions as they are
    costs, gains, own_costs = weights @ curve_cost.T, weights @ curve_gain.T, weights @ cost
    if not costs[0].min() <= own_costs[0] <= costs[0].max():
        return None
    order = np.argsort(costs, axis=1, kind="stable")
    costs, gains = np.take_along_axis(costs, order, axis=1), np.take_along_axis(gains, order, axis=1)
    heights = [np.interp(x, xs, ys) for x, xs, ys in zip(own_costs, costs, gains, strict=True)]
    differences = weights @ gain - np.asarray(heights)
    return Interval(float(differences[0]), *percentiles(differences[1:]))


def percentiles(values: Floats) -> tuple[float, float]:
    """Ends of the 95 % interval of bootstrapped values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
