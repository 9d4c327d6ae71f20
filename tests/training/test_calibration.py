"""Metrics against scikit-learn and by hand; calibration undoes a distortion."""

import numpy as np
import pytest
from scipy.special import expit

from rtap_core.errors import ConfigError
from rtap_training.evaluation.calibration import (
    Figures,
    best_threshold,
    cross_validated,
    figures,
    fit_logistic,
    histogram,
)
from rtap_training.evaluation.statistics import expected_calibration_error, global_auroc

NAMED = ("within_auroc", "brier")


def test_knowing_only_which_questions_are_hard_is_worth_nothing_within_them() -> None:
    questions = [0] * 4 + [1] * 4 + [2] * 2
    scores = np.array([0.9] * 4 + [0.1] * 4 + [0.5] * 2)
    labels = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=bool)
    known = figures(scores, labels, questions)
    assert (known.within_auroc, known.contrast_questions) == (0.5, 2)
    assert (known.global_auroc or 0.0) > 0.6


def test_perfect_ranking_within_questions_is_one() -> None:
    labels = np.array([1, 0, 1, 0], dtype=bool)
    assert figures(np.array([0.4, 0.3, 0.9, 0.8]), labels, [0, 0, 1, 1]).within_auroc == 1.0


def test_ece_by_hand() -> None:
    scores, labels = np.array([0.91, 0.91, 0.11, 0.11]), np.array([1, 1, 0, 1], dtype=bool)
    assert figures(scores, labels, [0, 1, 2, 3]).ece == pytest.approx(0.5 * 0.09 + 0.5 * 0.39)


def test_platt_recovers_the_distortion() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, 20_000)
    labels = generator.random(20_000) < expit(logits)
    offset, slope = fit_logistic((2 * logits + 3)[:, None], labels)
    assert slope == pytest.approx(0.5, abs=0.03)
    assert offset == pytest.approx(-1.5, abs=0.1)


def test_platt_stays_finite_on_separable_data() -> None:
    offset, slope = fit_logistic(np.array([[-4.0], [-3.0], [3.0], [4.0]]), np.array([0, 0, 1, 1], dtype=bool))
    assert np.isfinite([slope, offset]).all()
    assert slope > 0


def test_best_threshold_separates() -> None:
    scores, labels = np.array([0.1, 0.2, 0.3, 0.8, 0.9]), np.array([0, 0, 0, 1, 1], dtype=bool)
    threshold = best_threshold(scores, labels)
    assert 0.3 < threshold < 0.8
    assert sum(histogram(scores)) == pytest.approx(1, abs=1e-3)


def test_intervals_hold_the_figures_and_shrink_with_more_questions() -> None:
    generator = np.random.default_rng(2)

    def measured(num_questions: int) -> Figures:
        questions = np.repeat(np.arange(num_questions), 6)
        scores = generator.random(len(questions))
        return figures(scores, generator.random(len(questions)) < scores, list(questions))

    few, many = measured(40), measured(1000)
    for one in (few, many):
        assert all(one.intervals[name][0] <= getattr(one, name) <= one.intervals[name][1] for name in NAMED)
    width = {one.cycles: [high - low for low, high in one.intervals.values()] for one in (few, many)}
    assert all(wide > 2 * narrow for wide, narrow in zip(*width.values(), strict=True))


def test_repeating_every_cycle_of_a_question_adds_no_certainty() -> None:
    """Questions are resampled, so copies of their cycles change no interval."""
    generator = np.random.default_rng(3)
    questions = np.repeat(np.arange(30), 4)
    scores = generator.random(120)
    labels = generator.random(120) < scores
    once = figures(scores, labels, list(questions)).intervals
    thrice = figures(np.tile(scores, 3), np.tile(labels, 3), list(np.tile(questions, 3))).intervals
    assert all(thrice[name] == pytest.approx(once[name], abs=2e-4) for name in once)


def test_intervals_without_contrast_leave_the_auroc_out() -> None:
    assert set(figures(np.array([0.5, 0.7]), np.array([True, True]), [0, 1]).intervals) == {"ece", "brier"}


def test_each_row_is_scored_by_a_regression_on_other_questions() -> None:
    generator = np.random.default_rng(0)
    questions = [q for q in range(200) for _ in range(4)]
    useful = generator.normal(0, 1, 800)
    labels = generator.random(800) < expit(2 * useful)
    known = generator.normal(0, 1, 800)
    scores = cross_validated(np.column_stack([useful, known]), labels, questions)
    assert global_auroc(scores, labels) == pytest.approx(global_auroc(useful, labels), abs=0.02)
    assert expected_calibration_error(scores, labels) < 0.1
    bias, first, second = fit_logistic(np.column_stack([useful, known]), labels)
    assert (bias, first, second) == (pytest.approx(0, abs=0.3), pytest.approx(2, abs=0.4), pytest.approx(0, abs=0.3))


def test_without_contrast_in_a_part_there_is_no_cross_validation() -> None:
    with pytest.raises(ConfigError, match="too few questions to cross-validate"):
        cross_validated(np.zeros((4, 1)), np.array([True, False, False, False]), [0, 1, 2, 3])
