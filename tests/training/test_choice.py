"""Choosing among k samples, on numbers made by hand."""

import pytest

from rtap_training.bundled.choice import Sample, best, compare, vote

A, B, C = "a", "b", "c"


def sample(answer: str | None, right: bool, generator: float, logprob: float = 0.0, other: float = 0.0) -> Sample:
    return Sample(answer, right, {"generator": generator, "logprob": logprob, "other": other})


def test_best_takes_the_highest_score_and_never_a_cut_cycle() -> None:
    samples = [sample(A, False, 0.2), sample(None, False, 0.9), sample(B, True, 0.6), sample(C, False, 0.6)]
    assert best(samples, "generator")  # of 0.6 and 0.6 the earlier
    assert not best(samples[:2], "generator")
    assert not best([sample(None, False, 0.9)], "generator")


def test_vote_takes_the_most_frequent_answer_and_cut_cycles_do_not_vote() -> None:
    assert vote([sample(A, True, 0), sample(B, False, 0), sample(A, True, 0)])
    assert not vote([sample(B, False, 0), sample(A, True, 0)])  # tied: the earlier
    assert vote([sample(None, False, 0), sample(None, False, 0), sample(A, True, 0)])
    assert not vote([sample(None, False, 0)])


def test_comparison_by_hand() -> None:
    """Two questions of four samples: k = 2 has two groups a question, k = 4 one, k = 8 none."""
    first = [
        sample(A, False, 0.1, -1, 0),
        sample(B, True, 0.9, -2, 1),
        sample(A, False, 0.2, -1, 1),
        sample(C, False, 0.3),
    ]
    second = [
        sample(B, True, 0.8, -3, 0),
        sample(A, False, 0.9, -1, 1),
        sample(B, True, 0.7, 0, 0),
        sample(B, True, 0, -1),
    ]
    report = compare([first, second], generator="generator", baselines=["logprob", "other"])
    assert (report["questions"], report["samples"]) == (2, 4)
    assert report["single"][0] == pytest.approx((0.25 + 0.75) / 2)
    assert report["any_right"] == [1.0, 1.0, 1.0]
    pairs = report["best_of_2"]
    assert pairs["generator"][0] == pytest.approx(((1 + 0) / 2 + (0 + 1) / 2) / 2)
    assert pairs["vote"][0] == pytest.approx(((0 + 0) / 2 + (1 + 1) / 2) / 2)
    assert pairs["logprob"][0] == pytest.approx(((0 + 0) / 2 + (0 + 1) / 2) / 2)
    assert pairs["other"][0] == pytest.approx(((1 + 0) / 2 + (0 + 1) / 2) / 2)
    assert pairs["best_baseline"] == "other"
    assert pairs["generator_minus_vote"][0] == 0
    assert pairs["generator_minus_best_baseline"] == [0.0, 0.0, 0.0]
    assert report["best_of_4"]["generator"][0] == 0.5
    assert "best_of_8" not in report


def test_a_perfect_score_reaches_the_ceiling_with_a_tight_interval() -> None:
    questions = [[sample(str(i), i == q % 4, float(i == q % 4)) for i in range(8)] for q in range(50)]
    report = compare(questions, generator="generator", baselines=["logprob"])
    assert report["best_of_8"]["generator"] == [1.0, 1.0, 1.0]
    low, high = report["best_of_8"]["generator_minus_vote"][1:]
    assert low > 0.5
    assert high <= 1
