"""Checkpoint lookup, resume checks and log callbacks of RL runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rtap_training.config.rl import SAME_RUN, RlConfig
from rtap_training.events import TAG, Sample, add_events
from rtap_training.run_state import LineLog, check_same_settings, last_complete, plain
from rtap_training.run_state import describe as describe_settings


def describe(config: RlConfig) -> str:
    """JSON of the config, versions and commit that made a checkpoint."""
    return describe_settings(_settings(config))


def check_same_run(checkpoint: Path, config: RlConfig) -> None:
    """Raise ConfigError if ``checkpoint`` was made with settings that must not change on resume."""
    check_same_settings(checkpoint, _settings(config), SAME_RUN)


def _settings(config: RlConfig) -> dict[str, Any]:
    return {"method": str(config.method)} | plain(config)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    return last_complete(run_dir, "checkpoint")


class SamplesTable(TrainerCallback):
    """Write a table of the newest rollouts to TensorBoard at every log event. newest: returns them."""

    def __init__(self, folder: Path, newest: Callable[[], Sequence[Sample]], *, is_writer: bool) -> None:
        self._folder, self._newest, self._is_writer = folder, newest, is_writer

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the table."""
        del args, control, kwargs
        if self._is_writer and "loss" in (logs or {}):
            add_events(self._folder, state.global_step, {}, {TAG: self._newest()})


class JsonLog(TrainerCallback):
    """JSON-lines log. A resumed run drops the lines of updates that it repeats."""

    def __init__(self, path: Path, *, resumed_at: int, is_writer: bool) -> None:
        self.last: dict[str, Any] = {}
        self._log = LineLog(path, resumed_at=resumed_at) if is_writer else None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append a line; ``last`` keeps the newest metrics for the manifest."""
        del args, control, kwargs
        figures = {"step": state.global_step} | cast(dict[str, Any], logs or {})
        if "loss" in figures:
            self.last = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        if self._log is not None:
            self._log.write(figures)
