"""Processes of one run share the sampling of its questions."""

from pathlib import Path

import pytest

from rtap_training.config.supervised import SupervisedConfig
from rtap_training.data import trajectories
from rtap_training.data.questions import held_out_questions
from rtap_training.data.trajectories import SampledTrajectory, sample_parts
from rtap_training.models.loading import load_dialect
from rtap_training.tasks import TASKS
from tests.training.rl.tiny import BUNDLED

QUESTIONS = held_out_questions(TASKS["arithmetic"], 5)


class Processes:
    """The state of one process of two, which waits for nothing."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index = index

    def wait_for_everyone(self) -> None:
        pass


def test_two_processes_sample_a_share_each_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = str(BUNDLED / "policy")
    _, _, dialect = load_dialect(policy)
    config = SupervisedConfig(policy=policy, output=tmp_path / "output", samples=2, max_cycle_tokens=40)
    asked = list[str]()
    sample = trajectories.roll_out

    def count(questions, *arguments, **options):
        asked.extend(one.question for one in questions)
        return sample(questions, *arguments, **options)

    monkeypatch.setattr(trajectories, "roll_out", count)

    def run(index: int) -> list[SampledTrajectory]:
        monkeypatch.setattr(trajectories, "PartialState", lambda: Processes(index))
        (turns,) = sample_parts(policy, dialect, {"all": QUESTIONS}, config, max_cycles=1)
        return turns

    first, second = run(0), run(1)
    assert first == second
    assert [turn.question for turn in first] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert sorted(asked) == sorted(str(i) for i in range(5) for _ in range(2))  # none twice
    names = {file.name for file in (tmp_path / "output.run").iterdir()}
    assert names == {"samples-all-1-of-2.jsonl", "samples-all-2-of-2.jsonl"}
