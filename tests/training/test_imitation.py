"""Imitation of a teacher: training rows and the command."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rtap_core.format import RTAP
from rtap_training.__main__ import main
from rtap_training.bundled.imitation import right_turns
from rtap_training.huggingface import encode_text, load_policy, load_tokenizer, token_id
from rtap_training.rollout import SampledCycle, Trajectory
from rtap_training.tasks.trajectory import TURN_END

POLICY = Path("deploy/models/policy")
SHORT = ["--tasks", "arithmetic=1", "--questions", "12", "--samples", "2", "--max-steps", "2", "--eval-questions", "4"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(POLICY)


def test_a_turn_is_learnt_up_to_its_first_right_cycle(tokenizer: PreTrainedTokenizerFast) -> None:
    def cycle(answer: str, *, right: bool) -> SampledCycle:
        return SampledCycle(tuple(encode_text(tokenizer, RTAP.render_cycle("so", answer))), answer, right)

    end, prompt = token_id(tokenizer, TURN_END), [5, 6, 7]
    wrong, right = cycle("81", right=False), cycle("82", right=True)
    turns = [
        Trajectory(0, prompt, [right], is_open=False),
        Trajectory(0, prompt, [wrong, right], is_open=False),
        Trajectory(0, prompt, [wrong], is_open=True),
        Trajectory(0, prompt, [], is_open=True),
    ]
    first, second = right_turns(turns, end)
    assert first.ids == [*prompt, *right.ids, end]
    assert second.ids == [*prompt, *wrong.ids, *right.ids, end]
    for row in (first, second):
        assert row.is_trained == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))


def test_the_command_writes_a_student_that_learnt_of_its_teacher(tmp_path: Path) -> None:
    output = tmp_path / "student"
    student = str(Path("deploy/models/student"))
    assert main(["demo-imitate", "--policy", student, "--output", str(output), *SHORT]) == 0
    figures = json.loads((output / "manifest.json").read_text())["figures"]
    assert figures["steps"] == 2
    assert 0 < figures["rows"] <= 24
    model, _ = load_policy(output)
    before, _ = load_policy(Path(student))
    assert model.config.hidden_size == before.config.hidden_size
    assert not model.lm_head.weight.equal(before.lm_head.weight)
    assert not list((tmp_path / "student.run").glob("samples*"))


def test_a_teacher_that_is_never_right_has_nothing_to_teach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tasks", "knights=1", "--questions", "2", "--samples", "1", "--max-steps", "1", "--eval-questions", "1"]
    output = tmp_path / "student"
    assert main(["demo-imitate", "--teacher", "deploy/models/student", "--output", str(output), *flags]) == 2
    assert "answered none of 2 questions right; use another teacher" in capsys.readouterr().err
    assert not output.exists()
