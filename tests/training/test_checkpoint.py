"""A checkpoint is complete or absent, whatever happens while it is written."""

from pathlib import Path

import pytest

from rtap_training.bundled.config import StartConfig
from rtap_training.checkpoint import git_commit, manifest, replacing


def write(output: Path, text: str) -> None:
    with replacing(output) as folder:
        (folder / "model").write_text(text)


def test_a_new_checkpoint_replaces_the_old_one_and_keeps_the_card(tmp_path: Path) -> None:
    output = tmp_path / "policy"
    write(output, "first")
    (output / "README.md").write_text("card")
    (output / "stale").write_text("x")
    write(output, "second")
    assert sorted(p.name for p in output.iterdir()) == ["README.md", "model"]
    assert (output / "model").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "policy"
    write(output, "first")
    with pytest.raises(TypeError):
        write(output, None)  # type: ignore[arg-type]  # fails after the folder was made
    assert (output / "model").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_a_kill_between_the_renames_is_repaired(tmp_path: Path) -> None:
    output = tmp_path / "policy"
    write(output, "first")
    output.rename(tmp_path / ".policy.old")  # what a kill in that instant leaves
    with pytest.raises(TypeError):
        write(output, None)  # type: ignore[arg-type]
    assert (output / "model").read_text() == "first"


def test_the_manifest_says_how_it_came_about() -> None:
    record = manifest("rtap train demo-start", StartConfig(seed=5), data="x", seconds=1.25, figures={"loss": 0.5})
    assert record["config"]["seed"] == 5
    assert record["figures"] == {"loss": 0.5}
    assert set(record) == {
        "command", "config", "data_sha256", "training_seconds", "figures", "versions", "machine", "git_commit",
    }  # fmt: skip
    assert record["git_commit"] == git_commit()
