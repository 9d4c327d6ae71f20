"""One checker over all tasks, and the split by hash."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import ConfigError
from rtap_training.tasks import TASKS, check, parse_mix, task_of
from rtap_training.tasks.base import Split, sample_split, split_of


@pytest.mark.parametrize("name", sorted(TASKS))
@given(seed=st.integers(0, 2**32))
def test_one_task_claims_each_question(name: str, seed: int) -> None:
    rng = Random(seed)
    problem = TASKS[name].sample(rng)
    question = problem.phrase(rng)
    assert task_of(question) is TASKS[name]
    # A Countdown question may read as an expression too ("1 2 3"); its target decides. No other pair overlaps.
    claiming = {n for n, task in TASKS.items() if task.claims(question)}
    assert claiming - {"arithmetic"} == {name} - {"arithmetic"}
    assert check(question, problem.reference, "")


def test_other_questions_are_compared_with_the_reference() -> None:
    assert check("Who is a knight?", " A ", "A")
    assert not check("Who is a knight?", "B", "A")
    assert check("What share of a dollar is 50 cents?", "0.5", "1/2")


@pytest.mark.parametrize(
    ("question", "reference"),
    [
        ("James writes a 3-page letter to each of two friends. How many pages?", "6"),
        ("What is 3 * 4 + twice that?", "36"),
        ("How do I get 10 from 2 boxes of 3 and 4?", "7 are missing"),
    ],
)
def test_a_question_that_only_reads_like_a_bundled_one_is_compared_with_its_reference(
    question: str, reference: str
) -> None:
    assert task_of(question) is not None
    assert check(question, reference, reference)
    assert not check(question, "12", reference)


def test_the_split_is_stable() -> None:
    # Fixed values: changing the hash would move held-out questions into training.
    held_out = [t for t in range(60, 80) if split_of(f"countdown:{t}:3,7,25") is Split.HELD_OUT]
    assert held_out == [70]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_tenth_is_held_out_and_disjoint(name: str) -> None:
    rng = Random(4)
    drawn = {TASKS[name].sample(rng).canonical for _ in range(8000)}
    held_out = {c for c in drawn if split_of(c) is Split.HELD_OUT}
    assert 0.07 < len(held_out) / len(drawn) < 0.13
    trained = {sample_split(TASKS[name], rng, Split.TRAIN).canonical for _ in range(2000)}
    assert not trained & held_out


def test_a_mix_is_scaled_and_drops_what_has_no_share() -> None:
    assert parse_mix("countdown=1, knights = 3,arithmetic=0") == {"countdown": 0.25, "knights": 0.75}
    assert parse_mix("knights") == {"knights": 1.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not a task"),
        ("chess=1", "'chess' is not a task; choose from countdown"),
        ("countdown=1,", "'' is not a task"),
        ("countdown=-1", "must be a number of at least 0"),
        ("countdown=nan", "must be a number"),
        ("countdown=inf", "must be a number"),
        ("countdown=", "must be a number"),
        ("countdown=0,knights=0", "all weights are 0"),
        ("knights=1,knights=2", "names knights twice"),
    ],
)
def test_other_mixes_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_mix(text)
