"""Arithmetic: right workings are true, a wrong one has exactly one slip, and only true text is trained."""

import operator
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_training.tasks.arithmetic import Arithmetic, parse_expression
from rtap_training.tasks.expression import evaluate

TASK = Arithmetic()
SEEDS = st.integers(0, 2**32)
EQUATION = re.compile(r"(-?\d+)([+\-*/])(\d+)=$")


def is_true(operation: str, result: str) -> bool:
    match = EQUATION.search(operation)
    assert match is not None, operation
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}[match[2]]
    return apply(int(match[1]), int(match[3])) == int(result)


@given(SEEDS)
def test_right_attempts_are_true_and_check(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    question = problem.phrase(rng)
    attempt = problem.right_attempt(rng)
    texts = [s.text for s in attempt.think]
    assert all(is_true(op, result) for op, result in zip(texts[::2], texts[1::2], strict=True))
    assert all(s.is_trained for s in (*attempt.think, attempt.answer))
    assert TASK.check(question, attempt.answer.text)
    assert parse_expression(question) is not None


@given(SEEDS)
def test_wrong_attempts_slip_once_and_train_nothing_false(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempt = problem.wrong_attempt(rng, [])
    if attempt is None:
        return
    assert not TASK.check(problem.phrase(rng), attempt.answer.text)
    assert not attempt.answer.is_trained
    pairs = list(zip(attempt.think[::2], attempt.think[1::2], strict=True))
    assert [is_true(op.text, result.text) for op, result in pairs].count(False) == 1
    assert all(result.is_trained == is_true(op.text, result.text) for op, result in pairs)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("37*48+65", "1841"),
        ("What is 12 * 9?", "108"),
        ("what is 12 times 9", "108"),
        ("12 x 9", "108"),
        ("12×9", "108"),
        ("Compute 85 - 17.", "68"),
        ("17-85", "-68"),
        ("84/7 = ?", "12"),
        ("(12+7)*9", "171"),
        ("7/2+1/2", "4"),
    ],
)
def test_known_questions(question: str, answer: str) -> None:
    assert TASK.check(question, answer)
    assert not TASK.check(question, str(int(answer) + 1))


@pytest.mark.parametrize("answer", ["", "108.0", "12*9", "1 08", "١٠٨", "108" + "0" * 10**6, "None", "--108", "+108"])
def test_answers_that_are_no_plain_integer_are_wrong(answer: str) -> None:
    assert not TASK.check("What is 12 * 9?", answer)


@pytest.mark.parametrize("question", ["", "hello", "12", "12*9 and 3*4", "1/0", "9**9", "*" * 10**6])
def test_questions_without_one_expression_have_no_right_answer(question: str) -> None:
    assert not TASK.check(question, "108")


def test_the_split_does_not_depend_on_operand_order() -> None:
    canonical: dict[str, set[str]] = {}
    rng = Random(0)
    for _ in range(20_000):
        problem = TASK.sample(rng)
        result = evaluate(problem.expression)
        assert result is not None
        canonical.setdefault(problem.canonical, set()).add(problem.reference)
    assert all(len(values) == 1 for values in canonical.values())
