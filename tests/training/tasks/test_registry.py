"""One checker over all tasks, and the split by hash."""

from random import Random

import pytest

from training.tasks import TASKS, check, task_of
from training.tasks.base import Split, sample_split, split_of


@pytest.mark.parametrize("name", sorted(TASKS))
def test_questions_are_dispatched_to_their_task(name: str) -> None:
    rng = Random(3)
    for _ in range(500):
        problem = TASKS[name].sample(rng)
        question = problem.phrase(rng)
        assert task_of(question) is TASKS[name], question
        assert check(question, problem.reference, "")


def test_other_questions_are_compared_with_the_reference() -> None:
    assert check("Who is a knight?", " A ", "A")
    assert not check("Who is a knight?", "B", "A")


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
