"""Votes: who leads, how sure the vote is, and how many samples come next."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.types import Cycle
from rtap_core.voting import Candidate, candidates, count_posterior, is_decided, majority, next_wave, wave_size

_BASE = Cycle(0, "t", "1", None, False, 10, 3, 0, 20, 0, 0.1, None, 0)
CONFIDENCES = st.none() | st.floats(0, 1)
VOTES = st.lists(st.tuples(CONFIDENCES, st.sampled_from("abc-")), max_size=20)


def _cycles(*scores: float | None, answers: str) -> list[Cycle]:
    return [
        replace(_BASE, index=i, confidence=s, answer=None if a == "-" else a)
        for i, (s, a) in enumerate(zip(scores, answers, strict=True))
    ]


def test_majority_counts_answers_that_differ_only_in_form():
    assert majority(_cycles(None, None, None, answers="aBb")) == 1
    assert majority(_cycles(None, None, answers="ab")) == 0  # a tie goes to the answer seen first
    assert majority(_cycles(None, None, answers="--")) is None


def test_four_samples_of_a_real_model_vote_on_their_boxes():
    texts = [
        "So \\(48+24=\\boxed{96}\\).",
        "She sold \\boxed{72} clips.",
        "Thus: \\boxed{72.0}",
        "It is $\\boxed{72}$.",
    ]
    assert majority([replace(_BASE, answer=text) for text in texts]) == 1


def test_majority_weighs_by_confidence_where_all_are_known():
    assert majority(_cycles(0.9, 0.2, 0.3, answers="abb")) == 0
    assert majority(_cycles(0.4, 0.2, 0.3, answers="abb")) == 1
    assert majority(_cycles(0.9, None, 0.3, answers="abb")) == 1  # counts


@pytest.mark.parametrize(
    ("leader", "second", "posterior"), [(0, 0, 0.5), (1, 0, 0.75), (2, 1, 0.6875), (4, 0, 0.96875), (5, 5, 0.5)]
)
def test_posterior_of_counts_is_the_tail_of_the_beta_distribution(leader, second, posterior):
    beta = pytest.importorskip("scipy.stats", reason="scipy is a development dependency").beta
    assert count_posterior(leader, second) == pytest.approx(posterior)
    assert count_posterior(leader, second) == pytest.approx(beta.sf(0.5, leader + 1, second + 1))


@given(VOTES)
def test_posteriors_are_probabilities_and_ordered_like_the_candidates_without_confidences(votes):
    ranked = candidates(_cycles(*(c for c, _ in votes), answers="".join(a for _, a in votes)))
    assert all(0 <= one.posterior <= 1 for one in ranked)
    assert sum(one.votes for one in ranked) == sum(a != "-" for _, a in votes)
    if all(c is None for c, _ in votes):
        assert [one.posterior for one in ranked] == sorted((one.posterior for one in ranked), reverse=True)
    elif ranked and all(c is not None for c, a in votes if a != "-"):
        assert sum(one.posterior for one in ranked) <= 1 + 1e-9  # the rest: none of them is right


@given(st.floats(0.01, 0.99), st.floats(0.51, 0.99))
def test_the_posterior_of_one_sample_is_its_confidence_and_agreement_raises_it(confidence, high):
    (one,) = candidates(_cycles(confidence, answers="a"))
    assert one.posterior == pytest.approx(confidence)
    (two,) = candidates(_cycles(high, high, answers="aa"))
    assert two.posterior > high
    assert candidates(_cycles(high, high, answers="ab"))[0].posterior < high


def _ranked(*votes: int) -> list[Candidate]:
    return candidates(_cycles(*[None] * sum(votes), answers="".join(a * n for a, n in zip("abc", votes, strict=False))))


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.5, 1), st.integers(0, 32))
def test_a_wave_is_the_fewest_samples_that_could_end_the_vote(leader, second, threshold, left):
    second = min(leader, second)
    size = wave_size(_ranked(leader, second), threshold, left)
    assert min(1, left) <= size <= left
    if threshold < 1 and size < left:
        assert count_posterior(leader + size, second) >= threshold
    if threshold < 1 and size > 1:
        assert count_posterior(leader + size - 1, second) < threshold


def test_waves_at_the_default_and_at_one():
    assert wave_size([], 0.95, 16) == 4
    assert wave_size(_ranked(3, 1), 0.95, 12) == 3
    assert wave_size([], 1.0, 16) == 16


@given(VOTES, st.floats(0.5, 1), st.lists(st.sampled_from("abc"), max_size=8))
def test_a_vote_that_counts_alone_decide_early_has_the_winner_of_all_samples(votes, threshold, more):
    given_answers = "".join(a for _, a in votes)
    ranked = candidates(_cycles(*[None] * len(votes), answers=given_answers))
    if ranked and ranked[0].posterior < threshold and is_decided(ranked, threshold, len(more)):
        everything = given_answers + "".join(more)
        assert majority(_cycles(*[None] * len(everything), answers=everything)) == ranked[0].first


@given(VOTES, st.floats(0, 1), st.integers(0, 32))
def test_the_next_wave_is_empty_exactly_when_a_vote_ends(votes, threshold, left):
    ranked = candidates(_cycles(*(c for c, _ in votes), answers="".join(a for _, a in votes)))
    ends = left == 0 or is_decided(ranked, threshold, left)
    assert next_wave(ranked, threshold, left) == (0 if ends else wave_size(ranked, threshold, left))
    assert (next_wave(ranked, threshold, left) == 0) == ends
