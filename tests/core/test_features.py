"""Features of log-probabilities: by hand, for any tokens, and in linear time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.features import LOGPROB_FLOOR, LogprobFeatures, logprob_features
from tests.costs import cpu_seconds

LOGPROBS = st.one_of(st.floats(-1e3, 0), st.just(float("-inf")))


def features(text: list[str], answer: str | None = None) -> LogprobFeatures:
    """Features of tokens whose log-probabilities are -1, -2, …"""
    return logprob_features([(token, -1.0 - i) for i, token in enumerate(text)], answer)


def test_by_hand():
    known = logprob_features([("a", -0.1), ("b", -0.5), ("c", float("-inf"))], None)
    assert known.mean == pytest.approx(-30.6 / 3)
    assert (known.lowest, known.lowest_tenth, known.answer, known.tokens) == (-30.0, -30.0, known.mean, 3)
    many = logprob_features([("a", -float(i)) for i in range(20)], None)
    assert (many.lowest, many.lowest_tenth) == (-19.0, -18.5)


@pytest.mark.parametrize(
    ("tokens", "answer", "expected"),
    [
        (["is ", "\\boxed{", "4", "2", "}", "."], "is \\boxed{42}.", -3.5),
        (["<think>", "42", "</think>", "<answer>", "42", "</answer>"], "42", -5.0),  # the last occurrence
        (["4", "2", " then", " 142", " and", " 42.5"], "42", -1.5),  # not inside a longer number
        (["= ", "-", "96", "6"], "The answer is -966", -3.0),
        (["x", "y", " z"], "x y z", -2.0),  # tokenizers that drop white space
        (["no", "thing"], "7", -1.5),  # not found: the mean
        (["", "7", ""], "7", -2.0),  # special tokens have no text
        ([" ", "7"], " ", -1.5),
    ],
)
def test_the_answers_own_tokens_are_found_by_text(tokens, answer, expected):
    assert features(tokens, answer).answer == pytest.approx(expected)


@given(st.lists(st.tuples(st.text(max_size=6), LOGPROBS), min_size=1, max_size=50), st.text(max_size=12) | st.none())
def test_any_tokens_have_finite_features_in_order(tokens, answer):
    known = logprob_features(tokens, answer)
    assert all(math.isfinite(value) and value >= LOGPROB_FLOOR for value in known)
    assert known.lowest <= known.lowest_tenth + 1e-9
    assert known.lowest_tenth <= known.mean + 1e-9
    assert LogprobFeatures.from_shown(known.shown()) == pytest.approx(known, abs=1e-5)


def test_a_long_hostile_cycle_takes_linear_time():
    tokens = [("1" * 10, -1.0)] * 100_000
    assert cpu_seconds(lambda: logprob_features(tokens, "1" * 2000)) < 2.0


@pytest.mark.parametrize(
    "wrong", [{}, {"mean": None}, {"mean": "x"}, {"mean": math.nan}, {"tokens": 0}, {"answer": math.inf}]
)
def test_shown_features_that_are_none_are_errors(wrong):
    shown = {"mean": -1, "lowest": -2, "lowest_tenth": -2, "answer": -1, "tokens": 3}
    with pytest.raises((KeyError, TypeError, ValueError)):
        LogprobFeatures.from_shown(shown | wrong if wrong else {})
