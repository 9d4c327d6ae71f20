"""Majority vote over samples."""

from dataclasses import replace

from rtap_core.types import Cycle
from rtap_core.voting import majority

_BASE = Cycle(0, "t", "1", None, False, 10, 3, 0, 20, 0, 0.1, None, 0)


def _cycles(*scores: float | None, answers: str) -> list[Cycle]:
    return [
        replace(_BASE, index=i, confidence=s, answer=None if a == "-" else a)
        for i, (s, a) in enumerate(zip(scores, answers, strict=True))
    ]


def test_majority_counts_answers_that_differ_only_in_form():
    assert majority(_cycles(None, None, None, answers="aBb")) == 1
    assert majority(_cycles(None, None, answers="ab")) == 0  # a tie goes to the answer seen first
    assert majority(_cycles(None, None, answers="--")) is None


def test_majority_weighs_by_confidence_where_known():
    assert majority(_cycles(0.9, 0.2, 0.3, answers="abb")) == 0
    assert majority(_cycles(0.4, 0.2, 0.3, answers="abb")) == 1
