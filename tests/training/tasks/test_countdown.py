"""Countdown: workings are correct calculations, the checker is exact, phrasings parse."""

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_training.tasks.base import Attempt
from rtap_training.tasks.countdown import Countdown, CountdownProblem, candidates, parse_question
from rtap_training.tasks.expression import evaluate

TASK = Countdown()
SEEDS = st.integers(0, 2**32)


def problem_of(seed: int) -> CountdownProblem:
    return TASK.sample(Random(seed))


def statements(attempt: Attempt) -> list[tuple[str, int]]:
    """The equations of a working."""
    text = "".join(s.text for s in attempt.think)
    return [(left, int(right)) for left, right in re.findall(r"(\S+)=(\d+)", text)]


@given(SEEDS)
def test_right_attempts_check_in_every_phrasing(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    question = problem.phrase(rng)
    attempt = problem.right_attempt(rng)
    assert parse_question(question) == problem
    assert TASK.check(question, attempt.answer.text)
    assert TASK.check(question, problem.reference)


@given(SEEDS)
def test_wrong_attempts_are_honest_and_wrong(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempt = problem.wrong_attempt(rng, [])
    assert attempt is not None
    assert not TASK.check(problem.phrase(rng), attempt.answer.text)
    for left, right in statements(attempt):
        result = evaluate(left)
        assert result is not None
        assert result.value == right
    value = evaluate(attempt.answer.text)
    assert value is not None
    assert value.value == attempt.value == statements(attempt)[-1][1] != problem.target


@given(SEEDS)
def test_results_and_answer_of_a_wrong_attempt_are_trained_but_turning_wrong_is_not(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempt = problem.wrong_attempt(rng, [])
    assert attempt is not None
    first, first_result, second, second_result = attempt.think
    assert first_result.is_trained
    assert second_result.is_trained
    assert attempt.answer.is_trained
    assert not first.is_trained
    begins_a_solution = any(
        c.value == problem.target and c.steps[0] == (first.text, int(first_result.text))
        for c in candidates(problem.numbers)
    )
    assert second.is_trained != begins_a_solution


@given(SEEDS)
def test_wrong_attempts_never_repeat(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempts: list[Attempt] = []
    while len(attempts) < 30 and (attempt := problem.wrong_attempt(rng, attempts)) is not None:
        attempts.append(attempt)
    answers = [a.answer.text for a in attempts]
    assert len(set(answers)) == len(answers) > 2


@given(st.tuples(*[st.integers(1, 25)] * 3))
def test_canonical_spelling_is_independent_of_number_order(numbers: tuple[int, int, int]) -> None:
    a, b, c = numbers
    assert {x.expression for x in candidates((a, b, c))} == {x.expression for x in candidates((c, a, b))}
    assert all(0 <= r <= 999 for x in candidates((a, b, c)) for _, r in x.steps)


def test_known_question() -> None:
    question = "make 82 from 3, 7, 25"
    assert TASK.check(question, "25*3+7")
    assert TASK.check(question, " 7 + 25 * 3 ")
    assert TASK.check("make 1 from 2, 4, 2", "4/2/2")


@pytest.mark.parametrize(
    "answer",
    ["82", "25*3+7+0", "25*3", "25*3+7-3+3", "75+7", "25*4-18", "(25*3+7", "25*3+7=82", "25*3+7 # 82", "25x3+7", ""],
)
def test_other_answers_are_wrong(answer: str) -> None:
    assert not TASK.check("make 82 from 3, 7, 25", answer)


@pytest.mark.parametrize(
    "question",
    [
        "make 82 from 3, 7",
        "make 82 from 1 2 3 4",
        "make from 3 7 25",
        "What is 12 * 9?",
        "make 1 make 2",
        "",
        "9" * 9999,
    ],
)
def test_other_questions_are_not_claimed(question: str) -> None:
    assert not TASK.claims(question)
    assert not TASK.check(question, "25*3+7")


def test_doubt_names_the_value_reached() -> None:
    problem = CountdownProblem((3, 7, 25), 82)
    last = problem.wrong_attempt(Random(1), [])
    assert last is not None
    doubts = {problem.doubt(Random(seed), last.value) for seed in range(50)}
    assert f"Oops, {last.value} is not 82. " in doubts
