"""The reliability plot is a PNG."""

import numpy as np

from rtap_training.evaluation.reliability import plot_png


def test_the_plot_is_a_png() -> None:
    scores, labels = np.array([0.91, 0.93, 0.11, 0.13, 1.0]), np.array([1, 0, 0, 0, 1], dtype=bool)
    assert plot_png({"countdown": (scores, labels), "all": (scores, labels)}, "title").startswith(b"\x89PNG")
