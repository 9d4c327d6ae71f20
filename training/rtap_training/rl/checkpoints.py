"""The files of an RL run beside its checkpoints: its log, and what it must agree on with the checkpoint it resumes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rtap_training.events import TAG, Sample, add_events
from rtap_training.rl.config import SAME_RUN, RlConfig
from rtap_training.run_state import LineLog, check_same_settings, last_complete, plain
from rtap_training.run_state import describe as describe_settings


def describe(config: RlConfig) -> str:
    """What made a checkpoint, as JSON: config, versions, commit."""
    return describe_settings(_settings(config))


def check_same_run(checkpoint: Path, config: RlConfig) -> None:
    """Raises ConfigError when ``checkpoint`` was made under settings that would make it another run."""
    check_same_settings(checkpoint, _settings(config), SAME_RUN)


def _settings(config: RlConfig) -> dict[str, Any]:
    return {"method": str(config.method)} | plain(config)


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return last_complete(run_dir, "checkpoint")


class SamplesTable(TrainerCallback):
    """Of the newest generation, in TensorBoard, as often as there are figures. ``newest``: its turns."""

    def __init__(self, folder: Path, newest: Callable[[], Sequence[Sample]], *, is_writer: bool) -> None:
        self._folder, self._newest, self._is_writer = folder, newest, is_writer

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """One table."""
        del args, control, kwargs
        if self._is_writer and "loss" in (logs or {}):
            add_events(self._folder, state.global_step, {}, {TAG: self._newest()})


class JsonLog(TrainerCallback):
    """One JSON line for each log event. A resumed run drops the lines of updates that it will repeat."""

    def __init__(self, path: Path, *, resumed_at: int, is_writer: bool) -> None:
        self.last: dict[str, Any] = {}
        self._log = LineLog(path, resumed_at=resumed_at) if is_writer else None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append; ``last`` keeps the newest figures for the manifest."""
        del args, control, kwargs
        figures = {"step": state.global_step} | cast(dict[str, Any], logs or {})
        if "loss" in figures:
            self.last = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
        if self._log is not None:
            self._log.write(figures)
