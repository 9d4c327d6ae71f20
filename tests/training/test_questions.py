"""Questions from tasks, mixes and files, restricted to the requested split."""

import json
from pathlib import Path

import pytest

from rtap_core.errors import ConfigError
from rtap_training.data.questions import held_out_questions, is_right, load_questions, message
from rtap_training.evaluation.question_files import GYM_PROMPT, check_prompt
from rtap_training.tasks import TASKS, task_of
from rtap_training.tasks.base import Question, Split
from rtap_training.tasks.gym import GymQuestion


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"question": f"q{n}?", "answer": str(n)}) + "\n" for n in range(count)))
    return path


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_by_name(name: str) -> None:
    questions = load_questions(name, Split.TRAIN, seed=1, count=200)
    assert len({q.question for q in questions}) == 200
    assert all(q.task == name and TASKS[name].check(q.question, q.answer) for q in questions)
    assert questions == load_questions(name, Split.TRAIN, seed=1, count=200)
    assert questions != load_questions(name, Split.TRAIN, seed=2, count=200)
    held_out = {q.question for q in held_out_questions(TASKS[name], 200)}
    assert not held_out & {q.question for q in questions}


def test_a_mix_has_its_shares_in_random_order() -> None:
    questions = load_questions("countdown=0.75,knights=0.25", Split.HELD_OUT, seed=0, count=400)
    assert len(questions) == 400
    assert 250 < sum(q.task == "countdown" for q in questions) < 350
    assert {q.task for q in questions[:20]} == {"countdown", "knights"}
    assert all(task_of(q.question) is TASKS[q.task] for q in questions)


def test_a_file_is_split_by_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", 500)
    trained, held_out = (load_questions(str(path), split, seed=0, count=10_000) for split in Split)
    assert len(trained) + len(held_out) == 500
    assert 30 < len(held_out) < 75
    assert not {q.question for q in trained} & {q.question for q in held_out}
    assert {q.task for q in trained} == {"mine"}
    assert len(load_questions(str(path), Split.TRAIN, seed=0, count=7)) == 7
    assert [q.answer for q in trained] != sorted((q.answer for q in trained), key=int)


def test_what_is_none_of_these_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'chess' is not a task.*; or give a \.jsonl file, rg:NAME or hf:DATASET"):
        load_questions("chess", Split.TRAIN, seed=0, count=1)
    with pytest.raises(ConfigError, match="cannot read the question file"):
        load_questions(str(tmp_path / "none.jsonl"), Split.TRAIN, seed=0, count=1)
    with pytest.raises(ConfigError, match="has no held_out question"):
        load_questions(str(write(tmp_path / "one.jsonl", 1)), Split.HELD_OUT, seed=0, count=1)


def test_the_message_asks_for_a_box_where_the_question_is_of_reasoning_gym() -> None:
    own, gym = Question("1 + 1", "2", "sums"), GymQuestion("1 + 1 =", "2", "chain_sum", "chain_sum", "{}", 0)
    assert message(own, "") == "1 + 1"
    assert message(gym, "") == GYM_PROMPT.replace("{question}", "1 + 1 =")
    assert message(own, "What is {question}?") == "What is 1 + 1?"
    with pytest.raises(ConfigError, match=r"prompt='What is it\?' has no \{question\}"):
        check_prompt("prompt=", "What is it?")


@pytest.mark.parametrize("question", [Question("q", "1/2", "t"), GymQuestion("q", "0.5", "t", "chain_sum", "{}", 0)])
def test_the_final_answer_of_a_text_is_judged(question: Question) -> None:
    assert is_right(question, "Half of it, so \\boxed{0.50}.")
    assert is_right(question, "0.5")
    assert not is_right(Question("q", "2", "t"), "1 + 1 = 3")
