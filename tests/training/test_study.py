"""Studies: strict suites, statistics, finished runs are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training import study
from rtap_training.__main__ import STAGES
from rtap_training.config.rl import CONFIGS
from rtap_training.config.settings import build_config

POLICY = Path("deploy/models/policy").resolve()

SUITE = """
title: T
seeds: [1, 2]
baseline: start
common: {policy: deploy/models/policy}
runs: {start: , trained: {method: grpo}}
measure: {tasks: [countdown], questions: 4, samples: 1, forced: 0, max_cycles: 1}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    return file


def test_suite_is_read(suite: Path) -> None:
    loaded = study.load_suite(suite)
    assert (loaded.seeds, loaded.runs) == ((1, 2), {"start": None, "trained": {"method": "grpo"}})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "titel: T", "title: Field required"),
        ("baseline: start", "baseline: other", "not one of the runs"),
    ],
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


STUDIES = sorted(Path("training/rtap_training/recipes/studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_run_of_a_recipe_is_settings_of_its_command(file: Path) -> None:
    suite = study.load_suite(file)
    kinds = {**CONFIGS, **{name: kind for name, (_, kind, _) in STAGES.items()}}
    for method, settings in map(suite.run, suite.runs):
        assert settings["policy"] == suite.common["policy"]
        if method is not None:
            assert str(build_config(kinds[method], None, settings).policy) == suite.common["policy"]


class Trainer:
    """Fake training command that outputs the starting policy. most: runs before it stops."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[str, str, int, int]] = []

    def __call__(self, command: str, settings: dict[str, Any]) -> None:
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append((command, settings["policy"], settings["max_steps"], settings["seed"]))
        shutil.copytree(POLICY, settings["output"])


@pytest.mark.slow
def test_what_is_done_is_kept(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.write_text(SUITE.replace("deploy/models/policy", f"{POLICY}, max_steps: 3"))
    monkeypatch.chdir(tmp_path)
    train = Trainer(most=1)
    with pytest.raises(KeyboardInterrupt):
        study.run(suite, tmp_path / "out", train)
    train.most = 2
    study.run(suite, tmp_path / "out", train)
    assert train.asked == [("grpo", str(POLICY), 3, 1), ("grpo", str(POLICY), 3, 2)]
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert {name: sorted(by_seed) for name, by_seed in figures.items()} == {"start": ["1", "2"], "trained": ["1", "2"]}
    trained = {seed: figures["trained"][seed]["countdown/first"] for seed in ("1", "2")}
    assert trained == {seed: figures["start"][seed]["countdown/first"] for seed in ("1", "2")}  # the same policy
    assert "| countdown/first | " in (tmp_path / "out" / "results.md").read_text()
