"""The pipeline runs stages in order, resumes, and installs complete models only."""

import os
from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.bundled import pipeline
from rtap_training.checkpoint import MANIFEST
from rtap_training.training_errors import TrainingError

RECIPE = """
stages:
  - {name: a, command: sft, settings: {seed: 1, max_steps: 100}, smoke: {max_steps: 1}}
  - {name: b, command: rtap, settings: {policy: "@a"}, install: {b: policy, b-confidence: confidence}}
  - {name: c, command: rtap, settings: {policy: "@b", confidence: "@b-confidence", questions: "@a/texts.jsonl"}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


class Commands:
    """Fake training commands: record the settings and write an output."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.ran: list[tuple[str, dict[str, Any]]] = []
        self.fails_at = fails_at

    def __call__(self, command: str, settings: dict[str, Any]) -> None:
        output = Path(settings["output"])
        if output.name == self.fails_at:
            raise KeyboardInterrupt
        self.ran.append((command, settings))
        for folder in (output, output.with_name(f"{output.name}-confidence")):
            folder.mkdir(parents=True)
            (folder / MANIFEST).write_text("{}")
            (folder / "model.safetensors").write_text(folder.name)


def run(recipe: Path, commands: Commands, *, is_smoke: bool = False, install_into: Path | None = None) -> None:
    pipeline.run(recipe, recipe.parent / "out", commands, is_smoke=is_smoke, install_into=install_into)


def test_stages_see_the_outputs_of_earlier_ones(recipe: Path, tmp_path: Path) -> None:
    commands = Commands()
    run(recipe, commands)
    out = str(tmp_path / "out")
    assert [(c, {k: v for k, v in s.items() if k != "output"}) for c, s in commands.ran] == [
        ("sft", {"seed": 1, "max_steps": 100}),
        ("rtap", {"policy": f"{out}/a"}),
        ("rtap", {"policy": f"{out}/b", "confidence": f"{out}/b-confidence", "questions": f"{out}/a/texts.jsonl"}),
    ]


def test_a_smoke_run_replaces_settings(recipe: Path) -> None:
    commands = Commands()
    run(recipe, commands, is_smoke=True)
    assert commands.ran[0][1]["max_steps"] == 1


def test_finished_stages_are_not_run_again(recipe: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(recipe, Commands(fails_at="c"))
    again = Commands()
    run(recipe, again)
    assert [Path(s["output"]).name for _, s in again.ran] == ["c"]


def test_installing_replaces_models_and_keeps_their_cards(recipe: Path, tmp_path: Path) -> None:
    card = tmp_path / "models" / "policy" / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("card")
    (card.parent / "stale.bin").write_text("old")
    run(recipe, Commands(), install_into=tmp_path / "models")
    assert sorted(p.name for p in card.parent.iterdir()) == ["README.md", MANIFEST, "model.safetensors"]
    assert card.read_text() == "card"
    assert (tmp_path / "models" / "confidence" / "model.safetensors").read_text() == "b-confidence"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace('policy: "@a"', 'policy: "@c"'), "stage b needs @c, but only"),
        (RECIPE.replace("@a/texts.jsonl", "@d/texts.jsonl"), "stage c needs @d/texts.jsonl, but only"),
        (RECIPE.replace("command: sft,", "command: sft, processes: 0,"), "processes=0 of stage a must be a number"),
        ("stages: 3", "cannot read the stages"),
        ("stages: [{name: a}]", "cannot read the stages"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(recipe, Commands())


def work(command: str, settings: dict[str, Any]) -> None:
    """Stand-in for a training command. Raises ConfigError in the second process if settings has ``fails``."""
    rank = os.environ["RANK"]
    if settings.get("fails") and rank == "1":
        raise ConfigError(f"no {command} for me")
    Path(settings["output"], rank).write_text(os.environ["WORLD_SIZE"])


def test_a_stage_of_two_processes_runs_in_both(tmp_path: Path) -> None:
    pipeline.run_in_processes(work, 2, "sft", {"output": str(tmp_path)})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2", "1": "2"}
    with pytest.raises(TrainingError, match=r"sft failed in process 1 of 2: .*no sft for me"):
        pipeline.run_in_processes(work, 2, "sft", {"output": str(tmp_path), "fails": True})
