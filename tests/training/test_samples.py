"""Sampling resumes chunk by chunk, from files with the same settings only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.sampling.files import CHUNK_ROWS, read_or_make
from rtap_training.training_errors import TrainingError

HEADER: dict[str, Any] = {"format": 3, "samples": CHUNK_ROWS // 2, "questions": 5, "seed": 7}  # chunks of two questions


class Recorder:
    """Fake sampler: lines encode question and seed; calls are recorded."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, indices: Sequence[int], seed: int) -> list[str]:
        self.asked.append(list(indices))
        return [json.dumps({"question": i, "samples": [seed % 1000] * 2}) for i in indices]


def test_what_is_read_is_what_was_sampled(tmp_path: Path) -> None:
    make = Recorder()
    first = read_or_make(tmp_path / "samples.jsonl", HEADER, make)
    assert make.asked == [[0, 1], [2, 3], [4]]
    assert read_or_make(tmp_path / "samples.jsonl", HEADER, make) == first
    assert len(make.asked) == 3


@pytest.mark.parametrize("size", [0, 0.1, 0.3, 0.5, 0.6, 0.9, 0.999])
def test_a_file_cut_anywhere_is_completed_to_the_same(tmp_path: Path, size: float) -> None:
    whole = read_or_make(tmp_path / "whole.jsonl", HEADER, Recorder())
    text = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(text[: int(size * len(text))])
    assert read_or_make(tmp_path / "cut.jsonl", HEADER, Recorder()) == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == text


def test_samples_of_another_setting_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    read_or_make(file, HEADER, Recorder())
    with pytest.raises(ConfigError, match=r"another policy or setting \(seed: 7\)"):
        read_or_make(file, HEADER | {"seed": 8}, Recorder())


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write samples"):
        read_or_make(tmp_path / "file" / "samples.jsonl", HEADER, Recorder())
