"""Run the stages of a recipe in turn (``rtap train pipeline``, ``make train``): the bundled models from nothing.

A stage that has written its checkpoint is not run again, and each stage resumes by itself, so a stopped pipeline goes
on where it was. ``@NAME`` in a setting is the output of the stage NAME. Not here: what the stages do.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import yaml

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import KEPT, MANIFEST, replacing

Run = Callable[[str, dict[str, Any]], None]
"""Run a training command with these settings, as ``rtap train COMMAND`` would."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command. smoke: settings that replace others in a quick run of the whole chain, where only the mechanics
    count. install: path under deploy/models that the output replaces when the pipeline is told to."""

    name: str
    command: str
    settings: Mapping[str, Any]
    smoke: Mapping[str, Any] = field(default_factory=dict[str, Any])
    install: Mapping[str, str] = field(default_factory=dict[str, str])


def load_stages(file: Path) -> list[Stage]:
    """Raises ConfigError where the file is unreadable or refers to a stage that does not come before."""
    try:
        loaded: Any = yaml.safe_load(file.read_text("utf-8"))
        stages = [Stage(**entry) for entry in loaded["stages"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"cannot read the stages of {file}: {error}") from error
    known: list[str] = []
    for stage in stages:
        for value in {**stage.settings, **stage.smoke}.values():
            if isinstance(value, str) and value.startswith("@") and _stage_of(value) not in known:
                raise ConfigError(f"{file}: stage {stage.name} needs {value}, but only {known} come before it")
        known.append(stage.name)
    return stages


def run(file: Path, folder: Path, run_command: Run, *, is_smoke: bool, install_into: Path | None) -> None:
    """Run what is left of the stages into ``folder``; then copy the installable outputs."""
    stages = load_stages(file)
    for stage in stages:
        output = folder / stage.name
        if (output / MANIFEST).exists():
            sys.stderr.write(f"pipeline: {stage.name} is done\n")
            continue
        started = monotonic()
        settings = {**stage.settings, **(stage.smoke if is_smoke else {})}
        sys.stderr.write(f"pipeline: {stage.name}\n")
        run_command(stage.command, {k: _resolve(v, folder) for k, v in settings.items()} | {"output": str(output)})
        sys.stderr.write(f"pipeline: {stage.name} took {(monotonic() - started) / 60:.1f} minutes\n")
    if install_into is not None:
        install(stages, folder, install_into)


def install(stages: Sequence[Stage], folder: Path, models: Path) -> None:
    """Copy outputs over the bundled models, each in one swap; model cards there are kept."""
    for stage in stages:
        for source, target in stage.install.items():
            with replacing(models / target) as fresh:
                for file in (folder / source).iterdir():
                    if file.is_file() and file.name not in KEPT:
                        shutil.copy2(file, fresh / file.name)


def _stage_of(value: str) -> str:
    """The stage behind ``@NAME`` or ``@NAME-confidence``, the generator that an RL stage writes beside its policy."""
    return value.removeprefix("@").removesuffix("-confidence")


def _resolve(value: Any, folder: Path) -> Any:
    return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value
