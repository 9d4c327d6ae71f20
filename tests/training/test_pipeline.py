"""The pipeline runs stages in order, resumes, and installs complete models only."""

from pathlib import Path
from typing import Any

import pytest

from rtap_core.errors import ConfigError
from rtap_training.bundled import pipeline
from rtap_training.checkpoint import MANIFEST

RECIPE = """
stages:
  - {name: a, command: sft, settings: {seed: 1, max_steps: 100}, smoke: {max_steps: 1}}
  - {name: b, command: rtap, settings: {policy: "@a"}, install: {b: policy, b-confidence: confidence}}
  - {name: c, command: rtap, settings: {policy: "@b", confidence: "@b-confidence"}}
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
        ("rtap", {"policy": f"{out}/b", "confidence": f"{out}/b-confidence"}),
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
        ("stages: 3", "cannot read the stages"),
        ("stages: [{name: a}]", "cannot read the stages"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(recipe, Commands())
