"""Class balance per question (eq. 6) and the labels of synthetic cycles."""

import re
from collections import defaultdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.format import split_cycles
from rtap_training.data.examples import Example, balance, collect, cycle_text, synthetic_texts
from rtap_training.tasks import TASKS
from rtap_training.tasks.countdown import Countdown, CountdownProblem
from rtap_training.tasks.expression import evaluate

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), min_size=1, max_size=60)


@given(ROWS)
def test_each_side_of_a_question_weighs_the_same(rows: list[tuple[int, int, bool]]) -> None:
    examples = balance(collect((q, (ids,), right) for q, ids, right in rows), global_weight=0.25)
    assert sum(e.count for e in examples) == len(rows)
    sums: defaultdict[int, dict[bool, float]] = defaultdict(dict)
    for e in examples:
        sums[e.question][e.is_right] = sums[e.question].get(e.is_right, 0.0) + e.weight
    for sides in sums.values():
        expected = [0.5, 0.5] if len(sides) == 2 else [0.25]
        assert list(sides.values()) == pytest.approx(expected)


def test_equal_cycles_are_merged() -> None:
    assert collect([(0, (1, 2), True)] * 3 + [(1, (1, 2), True)]) == [
        Example(0, (1, 2), True, 3),
        Example(1, (1, 2), True, 1),
    ]


@pytest.mark.parametrize("name", sorted(TASKS))
@given(seed=st.integers(0, 2**32))
def test_synthetic_labels_agree_with_the_checker(name: str, seed: int) -> None:
    rng = Random(seed)
    problem = TASKS[name].sample(rng)
    question = problem.phrase(rng)
    texts = synthetic_texts(problem, rng)
    assert sum(is_right for _, is_right in texts) == 2
    for text, is_right in texts:
        ((_, answer),) = split_cycles(text)
        assert answer is not None
        assert TASKS[name].check(question, answer) == is_right


def lie(think: str, answer: str) -> str:
    """Kind of false statement in a cycle for "make 30 from 4, 6, 9" that ends in 30."""
    computed = [evaluate(left) for left in re.findall(r"(\S+)=", think)]
    written = [int(n) for n in re.findall(r"=(\d+)", think)]
    if any(c is None or c.value != w for c, w in zip(computed, written, strict=True)):
        return "arithmetic"
    value = evaluate(answer)
    assert value is not None
    return "numbers" if value.value == 30 else "answer"


@pytest.mark.parametrize("name", sorted(TASKS))
@given(seed=st.integers(0, 2**32))
def test_nothing_of_a_hard_negative_is_trained(name: str, seed: int) -> None:
    rng = Random(seed)
    attempt = TASKS[name].sample(rng).false_attempt(rng)
    assert attempt is None or not any(s.is_trained for s in (*attempt.think, attempt.answer))


def test_hard_negatives_lie_in_every_way() -> None:
    problem = CountdownProblem((4, 6, 9), 30)
    attempts = [problem.false_attempt(Random(seed)) for seed in range(300)]
    cycles = [cycle for a in attempts if a is not None for cycle in split_cycles(cycle_text(a, ""))]
    assert all(think.endswith("=30") for think, _ in cycles)
    assert not any(Countdown().check("make 30 from 4, 6, 9", answer or "") for _, answer in cycles)
    assert {lie(think, answer or "") for think, answer in cycles} == {"arithmetic", "numbers", "answer"}
