"""Sampling resumes chunk by chunk, from files with the same settings only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.rollout import SampledCycle, Trajectory
from rtap_training.samples import CHUNK_ROWS, read_or_sample
from rtap_training.training_errors import TrainingError

HEADER: dict[str, Any] = {"format": 2, "samples": CHUNK_ROWS // 2, "questions": 5, "seed": 7}  # chunks of two questions


class Recorder:
    """Fake sampler: samples encode question and seed; calls are recorded."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, indices: Sequence[int], seed: int) -> list[Trajectory]:
        self.asked.append(list(indices))
        cycles = [SampledCycle((seed % 1000,), None, False), SampledCycle((1, 2), "b", True)]
        return [Trajectory(i, [i, i], list(cycles), is_open=False) for i in indices for _ in range(2)]


def test_what_is_read_is_what_was_sampled(tmp_path: Path) -> None:
    sample = Recorder()
    first = read_or_sample(tmp_path / "samples.jsonl", HEADER, sample)
    assert sample.asked == [[0, 1], [2, 3], [4]]
    assert read_or_sample(tmp_path / "samples.jsonl", HEADER, sample) == first
    assert len(sample.asked) == 3


@pytest.mark.parametrize("size", [0, 0.1, 0.3, 0.5, 0.6, 0.9, 0.999])
def test_a_file_cut_anywhere_is_completed_to_the_same(tmp_path: Path, size: float) -> None:
    whole = read_or_sample(tmp_path / "whole.jsonl", HEADER, Recorder())
    text = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(text[: int(size * len(text))])
    assert read_or_sample(tmp_path / "cut.jsonl", HEADER, Recorder()) == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == text


def test_samples_of_another_setting_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    read_or_sample(file, HEADER, Recorder())
    with pytest.raises(ConfigError, match=r"another policy or setting \(seed: 7\)"):
        read_or_sample(file, HEADER | {"seed": 8}, Recorder())


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write samples"):
        read_or_sample(tmp_path / "file" / "samples.jsonl", HEADER, Recorder())
