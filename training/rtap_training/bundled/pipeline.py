"""Run the stages of a recipe in order (``rtap train pipeline``, ``make train``).

Finished stages are skipped and an unfinished stage resumes, so a stopped pipeline continues. ``@NAME`` in a setting is
the output of stage NAME, ``@NAME/FILE`` a file in it.
"""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import KEPT, MANIFEST, replacing
from rtap_training.training_errors import TrainingError

Run = Callable[[str, dict[str, Any]], None]
"""(command, settings) -> None: run ``rtap train COMMAND``."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the recipe.

    processes: data-parallel processes on this machine. smoke: settings that override others in a smoke run. install:
    path under deploy/models that the output replaces with ``--install``.
    """

    name: str
    command: str
    settings: Mapping[str, Any]
    processes: int = 1
    smoke: Mapping[str, Any] = field(default_factory=dict[str, Any])
    install: Mapping[str, str] = field(default_factory=dict[str, str])


def load_stages(file: Path) -> list[Stage]:
    """Read a recipe. Raises ConfigError for an unreadable file or a reference to a later or unknown stage."""
    try:
        loaded: Any = yaml.safe_load(file.read_text("utf-8"))
        stages = [Stage(**entry) for entry in loaded["stages"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"cannot read the stages of {file}: {error}") from error
    known: list[str] = []
    for stage in stages:
        for value in {**stage.settings, **stage.smoke}.values():
            if isinstance(value, str) and value.startswith("@") and _stage_of(value) not in known:
                raise ConfigError(f"{file}: stage {stage.name} needs {value}, but only the stages {known} precede it")
        if type(stage.processes) is not int or stage.processes < 1:
            raise ConfigError(f"{file}: processes={stage.processes!r} of stage {stage.name} must be a number from 1 on")
        known.append(stage.name)
    return stages


def run(file: Path, folder: Path, run_command: Run, *, is_smoke: bool, install_into: Path | None) -> None:
    """Run the unfinished stages into ``folder``, then install their outputs if ``install_into`` is given."""
    stages = load_stages(file)
    for stage in stages:
        output = folder / stage.name
        if (output / MANIFEST).exists():
            sys.stderr.write(f"pipeline: {stage.name} is done\n")
            continue
        started = monotonic()
        settings = {**stage.settings, **(stage.smoke if is_smoke else {})}
        sys.stderr.write(f"pipeline: {stage.name}\n")
        resolved = {k: _resolve(v, folder) for k, v in settings.items()} | {"output": str(output)}
        if stage.processes == 1:
            run_command(stage.command, resolved)
        else:
            run_in_processes(run_command, stage.processes, stage.command, resolved)
        sys.stderr.write(f"pipeline: {stage.name} took {(monotonic() - started) / 60:.1f} minutes\n")
    if install_into is not None:
        install(stages, folder, install_into)


def run_in_processes(run_command: Run, processes: int, command: str, settings: dict[str, Any]) -> None:
    """Run a command in processes started by torchrun's launcher; they end with this one. Raises TrainingError."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=command,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, run_command)(command, settings)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise TrainingError(
            f"{command} failed in process {failure.local_rank} of {processes}: {failure.message}"
        ) from error


def install(stages: Sequence[Stage], folder: Path, models: Path) -> None:
    """Replace the bundled models atomically; their model cards are kept."""
    for stage in stages:
        for source, target in stage.install.items():
            with replacing(models / target) as fresh:
                for file in (folder / source).iterdir():
                    if file.is_file() and file.name not in KEPT:
                        shutil.copy2(file, fresh / file.name)


def _stage_of(value: str) -> str:
    """Stage name of ``@NAME``, ``@NAME/FILE`` or ``@NAME-confidence`` (the generator that an RL stage saves)."""
    return value[1:].partition("/")[0].removesuffix("-confidence")


def _resolve(value: Any, folder: Path) -> Any:
    return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value
