"""Suites are read strictly, statistics are right, and a finished run is not done again."""

import json
from pathlib import Path

import pytest

from server.rtap.errors import ConfigError
from training import study

SUITE = """
title: T
seeds: [1, 2]
baseline: start
common: {policy: deploy/models/policy}
runs: {start: , trained: {method: grpo}}
measure: {tasks: [countdown], questions: 4}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    return file


def test_suite_is_read(suite: Path) -> None:
    loaded = study.load_suite(suite)
    assert (loaded.seeds, loaded.runs) == ((1, 2), {"start": {}, "trained": {"method": "grpo"}})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("title: T", "titel: T", "must have exactly the keys"), ("baseline: start", "baseline: no", "none of the runs")],
)
def test_a_wrong_suite_is_refused(suite: Path, old: str, new: str, message: str) -> None:
    suite.write_text(SUITE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        study.load_suite(suite)


def test_interval_is_students() -> None:
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert study.interval([1.0]) == (1.0, float("inf"))


def test_differences_are_paired_by_seed(suite: Path) -> None:
    """Seeds differ by much more than the runs do: only pairing shows the difference."""
    results = {"start": {"1": {"a": 0.1}, "2": {"a": 0.9}}, "trained": {"1": {"a": 0.2}, "2": {"a": 1.0}}}
    text = study.render(study.load_suite(suite), results, command="c")
    assert "| a | +0.100 ± 0.000 |" in text
    assert "| a | 0.500 ± 5.082 | 0.600 ± 5.082 |" in text


def test_a_missing_figure_is_a_dash(suite: Path) -> None:
    results = {"start": {"1": {"a": 0.1, "b": None}}, "trained": {"1": {"a": 0.2}}}
    text = study.render(study.load_suite(suite), results, command="c")
    assert "| b | – | – |" in text


def test_what_is_done_is_kept(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []

    def work(_: study.Suite, name: str, seed: int, folder: Path) -> study.Figures:
        done.append((name, seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        return {"a": float(seed)}

    monkeypatch.setattr(study, "_train_and_measure", work)
    with pytest.raises(KeyboardInterrupt):
        study.run(suite, tmp_path / "out")
    study.run(suite, tmp_path / "out")
    assert done == [("start", 1), ("trained", 1), ("start", 2), ("start", 2), ("trained", 2)]
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert {name: sorted(by_seed) for name, by_seed in figures.items()} == {"start": ["1", "2"], "trained": ["1", "2"]}
    assert "| a | 1.500" in (tmp_path / "out" / "results.md").read_text()
