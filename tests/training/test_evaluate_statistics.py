"""Statistics: properties, known values, and agreement with scikit-learn."""

import math
import random

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from rtap_training.evaluation import statistics as s


def random_answers(seed: int, questions: int = 60, samples: int = 8) -> tuple[list[int], list[float], list[bool]]:
    """Weakly informative scores for answers to questions of unequal difficulty."""
    rng = random.Random(seed)
    index = [question for question in range(questions) for _ in range(samples)]
    ease = [rng.random() for _ in range(questions)]
    right = [rng.random() < ease[question] for question in index]
    scores = [min(max(rng.gauss(0.6 if label else 0.4, 0.2), 0.0), 1.0) for label in right]
    return index, scores, right


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_gives_the_published_numbers(successes: int, n: int, low: float, high: float) -> None:
    interval = s.wilson_interval(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_is_symmetric_in_right_and_wrong_and_knows_nothing_of_nothing() -> None:
    for k in range(51):
        right, wrong = s.wilson_interval(k, 50), s.wilson_interval(50 - k, 50)
        assert right.low == pytest.approx(1 - wrong.high)
        assert 0.0 <= right.low <= right.value <= right.high <= 1.0
    nothing = s.wilson_interval(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_mean_interval_is_mean_and_1_96_standard_errors() -> None:
    interval = s.mean_interval([1.0, 2.0, 3.0, 4.0])
    assert interval.value == 2.5
    assert interval.high - 2.5 == pytest.approx(1.959964 * math.sqrt(5 / 3) / 2)
    assert s.mean_interval([7.0]) == s.Interval(7.0, 7.0, 7.0)
    assert math.isnan(s.mean_interval([]).value)


def test_global_auroc_and_brier_agree_with_scikit_learn() -> None:
    _, scores, right = random_answers(1)
    assert s.global_auroc(scores, right) == pytest.approx(roc_auc_score(right, scores))
    assert s.brier(scores, right) == pytest.approx(brier_score_loss(right, scores))


def test_figures_that_cannot_be_known_are_none() -> None:
    assert s.global_auroc([0.1, 0.9], [True, True]) is None
    assert s.within_question_auroc([0, 0, 1], [0.1, 0.2, 0.3], [True, True, False]) is None
    assert math.isnan(s.brier([], []))
    assert math.isnan(s.expected_calibration_error([], []))


def test_within_question_auroc_is_the_mean_of_the_aurocs_of_mixed_questions() -> None:
    index, scores, right = random_answers(2)
    by_hand: list[float] = []
    pairs = wins = 0.0
    for question in set(index):
        rows = [i for i, q in enumerate(index) if q == question]
        labels = [right[i] for i in rows]
        if len(set(labels)) == 2:
            by_hand.append(float(roc_auc_score(labels, [scores[i] for i in rows])))
            for good in (i for i in rows if right[i]):
                for bad in (i for i in rows if not right[i]):
                    pairs += 1
                    wins += (scores[good] > scores[bad]) + 0.5 * (scores[good] == scores[bad])
    within = s.within_question_auroc(index, scores, right)
    assert within is not None
    assert within.mixed_questions == len(by_hand)
    assert within.auroc.value == pytest.approx(np.mean(by_hand))
    assert within.pair_auroc == pytest.approx(wins / pairs)
    assert within.auroc.low < within.auroc.value < within.auroc.high


def test_a_score_that_only_knows_hard_questions_has_global_but_no_within_question_auroc() -> None:
    index, _, right = random_answers(3)
    share = {q: np.mean([right[i] for i, other in enumerate(index) if other == q]) for q in set(index)}
    difficulty = [float(share[question]) for question in index]
    within = s.within_question_auroc(index, difficulty, right)
    overall = s.global_auroc(difficulty, right)
    assert within is not None
    assert within.auroc.value == within.pair_auroc == 0.5
    assert overall is not None
    assert overall > 0.8


def test_expected_calibration_error_of_known_bins() -> None:
    # two bins: 4 answers at 0.9 of which 2 right (gap 0.4), 1 at 0.1 that is wrong (gap 0.1)
    scores, right = [0.9, 0.9, 0.9, 0.9, 0.1], [True, True, False, False, False]
    assert s.expected_calibration_error(scores, right, bins=2) == pytest.approx(0.8 * 0.4 + 0.2 * 0.1)
    assert s.expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0.0
    assert s.expected_calibration_error([1.0], [False]) == 1.0


def test_expected_calibration_error_puts_edges_in_the_upper_bin() -> None:
    # 0.5 and 0.7 share the upper of two bins: their gaps -0.5 and +0.7 partly cancel; in bins of their own they add up
    assert s.expected_calibration_error([0.5, 0.7], [True, False], bins=2) == pytest.approx(0.1)
    assert s.expected_calibration_error([0.49, 0.7], [True, False], bins=2) == pytest.approx((0.51 + 0.7) / 2)


def test_reliability_bins_by_hand_are_those_of_the_calibration_error() -> None:
    scores, right = np.array([0.91, 0.93, 0.11, 0.13, 1.0]), np.array([True, False, False, False, True])
    low, high, top = bins = s.reliability_bins(scores, right, bins=20)
    assert (low.confidence, low.right, low.cycles) == (pytest.approx(0.12), 0.0, 2)
    assert (high.confidence, high.right, high.cycles) == (pytest.approx(0.92), 0.5, 2)
    assert (top.confidence, top.right, top.cycles) == (1.0, 1.0, 1)  # 1.0 belongs to the last bin
    assert high.low < 0.5 < high.high
    gaps = sum(abs(b.confidence - b.right) * b.cycles for b in bins)
    assert gaps / 5 == pytest.approx(s.expected_calibration_error(scores, right))


def test_bootstrap_weights_draw_n_questions_and_repeat_with_the_seed() -> None:
    weights = s.bootstrap_weights(40, seed=5, resamples=100)
    assert weights.shape == (100, 40)
    assert (weights.sum(axis=1) == 40).all()
    assert (weights == s.bootstrap_weights(40, seed=5, resamples=100)).all()
    assert (weights != s.bootstrap_weights(40, seed=6, resamples=100)).any()


def test_paired_difference_is_narrow_where_pairs_agree_and_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        both = rng.random(300) < 0.5
        first = both | (rng.random(300) < 0.1)  # right as well in a tenth of the rest: true difference 0.05
        difference = s.paired_difference(list(first.astype(float)), list(both.astype(float)), seed=trial)
        assert difference.high - difference.low < 0.08  # unpaired it would be 0.16
        covered += difference.low <= 0.05 <= difference.high
    assert covered >= 35  # 38 expected; fewer than 35 has a chance of 2 %
    assert s.paired_difference([1.0, 0.0], [1.0, 0.0]) == s.Interval(0.0, 0.0, 0.0)


def test_equal_cost_difference_of_a_rule_on_the_curve_is_zero_and_of_a_worse_rule_its_loss() -> None:
    rng = np.random.default_rng(1)
    costs = np.stack([rng.poisson(20, 400), rng.poisson(40, 400), rng.poisson(80, 400)]).astype(float)
    gains = np.stack([rng.random(400) < p for p in (0.4, 0.6, 0.7)]).astype(float)
    same = s.equal_cost_difference(costs, gains, costs[1], gains[1])
    assert same is not None
    assert same.value == pytest.approx(0.0)
    assert (same.low, same.high) == (pytest.approx(0.0), pytest.approx(0.0))
    worse = s.equal_cost_difference(costs, gains, costs[1], np.zeros(400))
    assert worse is not None
    assert worse.value == pytest.approx(-float(gains[1].mean()))
    assert -0.7 < worse.low < worse.value < worse.high < -0.5
    assert s.equal_cost_difference(costs, gains, np.full(400, 1000.0), np.zeros(400)) is None
