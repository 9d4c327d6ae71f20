"""Cold-start turns: whole cycles in the shared format, nothing false trained, going on and stopping trained."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.format import RTAP, split_cycles
from rtap_training.tasks import TASKS
from rtap_training.tasks.base import Split, sample_split, split_of
from rtap_training.tasks.trajectory import TURN_END, build_turn, sample_conversation

WEIGHTS = {"countdown": 0.4, "arithmetic": 0.2, "knights": 0.4}


@pytest.mark.parametrize("name", sorted(TASKS))
@given(seed=st.integers(0, 2**32), num_wrong=st.integers(0, 4))
def test_a_turn_is_wrong_cycles_then_a_right_one(name: str, seed: int, num_wrong: int) -> None:
    rng = Random(seed)
    problem = TASKS[name].sample(rng)
    question = problem.phrase(rng)
    text = "".join(s.text for s in build_turn(problem, rng, num_wrong))
    assert text.endswith(TURN_END)
    cycles = split_cycles(text.removesuffix(TURN_END))
    verdicts = [answer is not None and TASKS[name].check(question, answer) for _, answer in cycles]
    assert verdicts == [False] * (len(cycles) - 1) + [True]
    assert len(cycles) <= num_wrong + 1
    rendered = "".join(RTAP.render_cycle(*cycle) for cycle in cycles if cycle[1])  # type: ignore[arg-type]
    assert rendered == text.removesuffix(TURN_END)


def test_going_on_after_wrong_and_stopping_after_right_are_trained() -> None:
    rng = Random(1)
    turn = build_turn(TASKS["countdown"].sample(rng), rng, 2)
    assert all(s.is_trained for s in turn if s.text in (RTAP.think_open, TURN_END))


def test_a_cycle_opened_after_a_right_answer_is_not_taught_to_open() -> None:
    rng = Random(1)
    turn = build_turn(TASKS["countdown"].sample(rng), rng, 0, is_confirmed=True)
    opened = [s.is_trained for s in turn if s.text == RTAP.think_open]
    answers = [answer for _, answer in split_cycles("".join(s.text for s in turn).removesuffix(TURN_END))]
    assert opened == [True, False]
    assert answers[0] == answers[1]


def test_equal_seeds_give_equal_conversations() -> None:
    first, second = ([sample_conversation(TASKS, WEIGHTS, rng) for _ in range(50)] for rng in (Random(7), Random(7)))
    assert first == second


def test_history_and_system_prompts_occur_and_history_is_trained_split() -> None:
    rng = Random(2)
    roles = [tuple(m.role for m in sample_conversation(TASKS, WEIGHTS, rng).messages) for _ in range(2000)]
    assert {("user",), ("system", "user"), ("user", "assistant", "user")} <= set(roles)
    problem = sample_split(TASKS["countdown"], rng, Split.TRAIN)
    assert split_of(problem.canonical) is Split.TRAIN
