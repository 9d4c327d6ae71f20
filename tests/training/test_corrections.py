"""Corrections of a policy's wrong cycles: training rows and the command."""

import json
from pathlib import Path
from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from rtap_core.format import RTAP, parse_cycle
from rtap_training.__main__ import main
from rtap_training.bundled.config import CorrectConfig
from rtap_training.bundled.corrections import build_rows
from rtap_training.bundled.data import Encoded
from rtap_training.bundled.own_cycles import training_problems
from rtap_training.huggingface import decode_ids, encode_text, load_policy, load_tokenizer
from rtap_training.rollout import SampledCycle, Trajectory, encode_question
from rtap_training.tasks import TASKS
from rtap_training.tasks.trajectory import TURN_END

POLICY = Path("deploy/models/policy")
QUESTIONS = ["arithmetic", "countdown", "knights"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(POLICY)


def cycle(tokenizer: PreTrainedTokenizerFast, think: str, answer: str | None, *, right: bool = False) -> SampledCycle:
    text = RTAP.render_cycle(think, answer or "")
    return SampledCycle(tuple(encode_text(tokenizer, text)), answer, right)


def trained_text(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> str:
    return decode_ids(tokenizer, [i for i, trained in zip(row.ids, row.is_trained, strict=True) if trained])


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_wrong_cycle_is_followed_by_a_right_one_that_alone_is_learnt(
    name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = CorrectConfig(tasks=name, questions=20, seed=5)
    problems, questions = training_problems(config)
    rng, task = Random(3), TASKS[name]
    for index, (problem, question) in enumerate(zip(problems, questions, strict=True)):
        wrong = problem.wrong_attempt(rng, [])
        assert wrong is not None
        assert problem.value_of(wrong.answer.text) == wrong.value
        cycles = [cycle(tokenizer, "so", wrong.answer.text), cycle(tokenizer, "hm", wrong.answer.text)]
        trajectory = Trajectory(index, encode_question(tokenizer, question), cycles, is_open=False)
        rows = build_rows(tokenizer, problems, [trajectory], rng)
        assert (len(rows.corrected), rows.kept, rows.confirmed) == (2, [], [])
        for depth, row in enumerate(rows.corrected, start=1):
            text = trained_text(tokenizer, row)
            assert text.startswith("<think>")
            assert text.endswith(TURN_END)
            _, answer = parse_cycle(text.removesuffix(TURN_END), RTAP)
            assert answer is not None
            assert task.check(question, answer)
            before = [i for c in cycles[:depth] for i in c.ids]
            assert row.ids[: len(trajectory.prompt) + len(before)] == [*trajectory.prompt, *before]
            assert not any(row.is_trained[: len(trajectory.prompt) + len(before)])


def test_own_right_cycles_are_kept_and_told_again_but_not_their_opening(tokenizer: PreTrainedTokenizerFast) -> None:
    problems, questions = training_problems(CorrectConfig(tasks="arithmetic", questions=1, seed=5))
    right = cycle(tokenizer, "easy", problems[0].reference, right=True)
    trajectory = Trajectory(0, encode_question(tokenizer, questions[0]), [right], is_open=False)
    rows = build_rows(tokenizer, problems, [trajectory], Random(0))
    assert not rows.corrected
    text = RTAP.render_cycle("easy", problems[0].reference)
    assert trained_text(tokenizer, rows.kept[0]) == f"{text}{TURN_END}"
    again = trained_text(tokenizer, rows.confirmed[0])
    assert again.endswith(f"{text.removeprefix('<think>')}{TURN_END}")
    assert "<think>" not in again
    assert decode_ids(tokenizer, rows.confirmed[0].ids).count("<think>") == 2


def test_a_cut_cycle_and_an_answer_that_is_none_teach_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    problems, questions = training_problems(CorrectConfig(tasks="arithmetic", questions=1, seed=5))
    prompt = encode_question(tokenizer, questions[0])
    cut = Trajectory(0, prompt, [cycle(tokenizer, "12*", None)], is_open=False)
    nonsense = Trajectory(0, prompt, [cycle(tokenizer, "so", "many")], is_open=False)
    rows = build_rows(tokenizer, problems, [cut, nonsense], Random(0))
    assert (rows.corrected, rows.kept, rows.confirmed) == ([], [], [])


def test_the_command_mends_and_leaves_a_policy_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["demo-correct", "--policy", str(POLICY), "--tasks", "countdown=1", "--questions", "24", "--samples", "2"]
    sizes = ["--max-steps", "4", "--eval-questions", "4", "--batch-tokens", "1024"]
    output = tmp_path / "corrected"
    assert main([*flags, *sizes, "--output", str(output)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"] == 4
    assert figures["rows"]["corrected"] > 5  # it is wrong more often than right
    assert figures["before"].keys() == figures["held_out"].keys() == {"countdown"}
    record = json.loads((output / "manifest.json").read_text())
    assert record["command"] == "rtap train demo-correct"
    before, after = load_policy(POLICY)[0].state_dict(), load_policy(output)[0].state_dict()
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    assert [p.name for p in (tmp_path / "corrected.run").glob("*.jsonl")] == ["train.jsonl"]
    assert main([*flags, *sizes, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
