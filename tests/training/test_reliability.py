"""Bins of the reliability plot by hand; the plot is a PNG."""

import numpy as np
import pytest

from rtap_training.evaluation.statistics import expected_calibration_error
from rtap_training.reliability import plot_png, reliability_bins

SCORES = np.array([0.91, 0.93, 0.11, 0.13, 1.0])
LABELS = np.array([1, 0, 0, 0, 1], dtype=bool)


def test_bins_by_hand() -> None:
    low, high, top = reliability_bins(SCORES, LABELS, bins=20)
    assert (low.confidence, low.right, low.cycles) == (pytest.approx(0.12), 0.0, 2)
    assert (high.confidence, high.right, high.cycles) == (pytest.approx(0.92), 0.5, 2)
    assert (top.confidence, top.right, top.cycles) == (1.0, 1.0, 1)  # 1.0 belongs to the last bin
    assert high.low < 0.5 < high.high


def test_bins_are_those_of_the_calibration_error() -> None:
    gaps = [abs(b.confidence - b.right) * b.cycles for b in reliability_bins(SCORES, LABELS)]
    assert sum(gaps) / len(SCORES) == pytest.approx(expected_calibration_error(SCORES, LABELS))


def test_the_plot_is_a_png() -> None:
    png = plot_png({"countdown": (SCORES, LABELS), "all": (SCORES, LABELS)}, "title")
    assert png.startswith(b"\x89PNG")
