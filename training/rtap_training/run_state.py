"""Log and resumable states of a training run, in the folder ``OUTPUT.run``.

Both survive a kill at any time: a truncated log line is dropped, and a state counts only once its last file exists.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import git_commit, versions
from rtap_training.config import run_dir
from rtap_training.training_errors import TrainingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Resumable(DataclassInstance, Protocol):
        """A config of a resumable command. MAY_CHANGE: fields that may differ when the run is resumed."""

        MAY_CHANGE: ClassVar[frozenset[str]]


COMPLETE_FILE = "complete.json"
"""The last file of a state; a state without it is ignored."""
STATE = "state"


def plain(config: "DataclassInstance") -> dict[str, Any]:
    """Fields of a config as JSON values."""
    return {name: str(v) if isinstance(v, Path | StrEnum) else v for name, v in asdict(config).items()}


def describe(settings: Mapping[str, Any], **more: Any) -> str:
    """JSON of the settings, versions and commit that made a state."""
    record = {"config": dict(settings), "versions": versions(), "git_commit": git_commit()} | more
    return json.dumps(record, indent=2) + "\n"


def check_same_settings(state: Path, now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ConfigError if ``state`` was made with other values of the settings ``names``."""
    earlier: dict[str, Any] = json.loads((state / COMPLETE_FILE).read_text("utf-8"))["config"]
    # A setting that did not exist then is no difference.
    differing = [f"{n}: was {earlier[n]!r}, is {now[n]!r}" for n in names if n in earlier and earlier[n] != now[n]]
    if differing:
        raise ConfigError(
            f"{state} belongs to a run with other settings ({'; '.join(differing)}); "
            f"use those settings, choose another output, or remove {state.parent}"
        )


def check_resumable(output: Path, config: "Resumable") -> None:
    """Raise ConfigError if the run that writes ``output`` was started with incompatible settings."""
    last = last_complete(run_dir(output), STATE)
    if last is not None:
        now = plain(config)
        check_same_settings(last, now, (name for name in now if name not in config.MAY_CHANGE))


def mark_complete(state: Path, record: str) -> None:
    """Mark ``state`` as complete; ``record`` is the text of ``describe``."""
    partial = state / f".{COMPLETE_FILE}"
    partial.write_text(record, "utf-8")
    partial.replace(state / COMPLETE_FILE)


def last_complete(folder: Path, prefix: str) -> Path | None:
    """The newest complete state ``PREFIX-STEP`` in ``folder``."""
    whole = [p.parent for p in folder.glob(f"{prefix}-*/{COMPLETE_FILE}")]
    return max(whole, key=step_of, default=None)


def step_of(state: Path) -> int:
    """Step number in a state's name."""
    return int(state.name.rsplit("-", 1)[1])


class LineLog:
    """JSON-lines log with one ``step`` per line. A resumed run drops lines after ``resumed_at``."""

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(line for line in kept if _is_kept(line, resumed_at)), "utf-8")
        partial.replace(path)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def _is_kept(line: str, resumed_at: int) -> bool:
    """Keep complete lines up to the resumed step; a kill may have truncated the last line."""
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= resumed_at
    except (ValueError, KeyError):
        return False


class States:
    """Resumable states of a run: folders ``state-STEP`` of weights (shared) and random states (own). Keeps the newest.

    data_sha256: digest of the training data, which the settings name but do not pin.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, data_sha256: str) -> None:
        self.folder = folder
        self._settings = settings
        self._data_sha256 = data_sha256

    @property
    def last(self) -> Path | None:
        """The newest complete state."""
        return last_complete(self.folder, STATE)

    @property
    def resume_hint(self) -> str:
        """Clause for an error message that names the last good state."""
        return f"the last good state is {self.last}" if self.last else "no state was saved yet"

    def load(self, state: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(shared, own). Raises ConfigError if the training data changed."""
        made: dict[str, Any] = json.loads((state / COMPLETE_FILE).read_text("utf-8"))
        if made["data_sha256"] != self._data_sha256:
            raise ConfigError(
                f"{state} was made from other data (the code, a checkpoint or a samples file changed); remove "
                f"{self.folder} to start over"
            )
        return _read(state / "shared.pt"), _read(state / "own.pt")

    def save(self, step: int, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Write a state, then remove older ones. Raises TrainingError."""
        folder = self.folder / f"{STATE}-{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "own.pt", own)
            _write(folder / "shared.pt", shared)
            self._complete(folder)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            if not (folder / COMPLETE_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(f"cannot save step {step}: {error}; {self.resume_hint}") from error

    def _complete(self, folder: Path) -> None:
        mark_complete(folder, describe(self._settings, data_sha256=self._data_sha256))
        for other in self.folder.glob(f"{STATE}-*"):
            if other != folder:
                # Remove the mark first: a half-removed folder must not count as complete.
                (other / COMPLETE_FILE).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Remove all states."""
        for state in self.folder.glob(f"{STATE}-*"):
            (state / COMPLETE_FILE).unlink(missing_ok=True)
            shutil.rmtree(state, ignore_errors=True)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write and fsync: a power cut must not leave the mark without the data."""
    with path.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
