"""What a run keeps in ``OUTPUT.run`` beside its checkpoint: a log, and states that it resumes from.

Both survive a kill at any instant: a log line that was cut is dropped, and a state counts only once its last file is
there. Not here: what a state holds (``loop.py``; TRL's checkpoints in ``training/rtap_training/rl``).
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import git_commit, versions
from rtap_training.config import run_dir
from rtap_training.parallel import rank, wait_for_all
from rtap_training.training_errors import TrainingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Resumable(DataclassInstance, Protocol):
        """A config. MAY_CHANGE: its fields that may differ when a run is resumed."""

        MAY_CHANGE: ClassVar[frozenset[str]]


COMPLETE_FILE = "complete.json"
"""Written last into a state; one without it is not used."""
STATE = "state"


def plain(config: "DataclassInstance") -> dict[str, Any]:
    """The fields of a config as JSON has them."""
    return {name: str(v) if isinstance(v, Path | StrEnum) else v for name, v in asdict(config).items()}


def describe(settings: Mapping[str, Any], **more: Any) -> str:
    """What made a state, as JSON: settings, versions, commit."""
    record = {"config": dict(settings), "versions": versions(), "git_commit": git_commit()} | more
    return json.dumps(record, indent=2) + "\n"


def check_same_settings(state: Path, now: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ConfigError when ``state`` was made under other settings of those names."""
    earlier: dict[str, Any] = json.loads((state / COMPLETE_FILE).read_text("utf-8"))["config"]
    differing = [f"{n}: {earlier.get(n)!r} then, {now[n]!r} now" for n in names if earlier.get(n) != now[n]]
    if differing:
        raise ConfigError(
            f"{state} is of a run with other settings ({'; '.join(differing)}); "
            f"give them again, name another output, or remove {state.parent}"
        )


def check_resumable(output: Path, config: "Resumable") -> None:
    """Raises ConfigError when the run that writes ``output`` was begun under settings that make it another."""
    last = last_complete(run_dir(output), STATE)
    if last is not None:
        now = plain(config)
        check_same_settings(last, now, (name for name in now if name not in config.MAY_CHANGE))


def mark_complete(state: Path, record: str) -> None:
    """Write the file that makes a state count; ``record`` is what ``describe`` gave."""
    partial = state / f".{COMPLETE_FILE}"
    partial.write_text(record, "utf-8")
    partial.replace(state / COMPLETE_FILE)


def last_complete(folder: Path, prefix: str) -> Path | None:
    """The newest state ``PREFIX-STEP`` in ``folder`` that was written to its end."""
    whole = [p.parent for p in folder.glob(f"{prefix}-*/{COMPLETE_FILE}")]
    return max(whole, key=step_of, default=None)


def step_of(state: Path) -> int:
    """The step that a state's name ends with."""
    return int(state.name.rsplit("-", 1)[1])


class LineLog:
    """JSON lines with a ``step`` each. A resumed run drops the lines of steps after ``resumed_at``: it repeats them."""

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
    """Whole lines of steps up to the state; a kill may have cut the last one."""
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= resumed_at
    except (ValueError, KeyError):
        return False


class States:
    """The states of a run: folders ``state-STEP`` with a file a process and one they share. The newest is kept.

    settings: what made them. data_sha256: of what is trained on, which the settings may name but not fix.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, data_sha256: str) -> None:
        self.folder = folder
        self._settings = settings
        self._data_sha256 = data_sha256

    @property
    def last(self) -> Path | None:
        """The newest whole one."""
        return last_complete(self.folder, STATE)

    @property
    def resume_hint(self) -> str:
        """The end of an error message: what is left to go on from."""
        return f"the last good state is {self.last}" if self.last else "there is no state yet"

    def load(self, state: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What all processes share, and this process's own part. Raises ConfigError for other data."""
        made: dict[str, Any] = json.loads((state / COMPLETE_FILE).read_text("utf-8"))
        if made["data_sha256"] != self._data_sha256:
            raise ConfigError(
                f"{state} was made from other data (the code, a checkpoint or a samples file has changed); remove "
                f"{self.folder} to start over"
            )
        return _read(state / "shared.pt"), _read(state / _own_file())

    def save(self, step: int, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Write a state, called in every process; older ones go once it is whole. Raises TrainingError."""
        folder = self.folder / f"{STATE}-{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / _own_file(), own)
            if rank() == 0:
                _write(folder / "shared.pt", shared)
            wait_for_all()
            if rank() == 0:
                self._complete(folder)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            if not (folder / COMPLETE_FILE).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(f"cannot save step {step}: {error}; {self.resume_hint}") from error

    def _complete(self, folder: Path) -> None:
        mark_complete(folder, describe(self._settings, data_sha256=self._data_sha256))
        for other in self.folder.glob(f"{STATE}-*"):
            if other != folder:
                # The mark goes first: a folder half removed must not count as whole.
                (other / COMPLETE_FILE).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Drop all states, after success."""
        for state in self.folder.glob(f"{STATE}-*"):
            (state / COMPLETE_FILE).unlink(missing_ok=True)
            shutil.rmtree(state, ignore_errors=True)


def _own_file() -> str:
    return f"process-{rank()}.pt"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """To the disk itself, so that a power cut cannot leave the mark without the rest."""
    with path.open("wb") as file:
        cast(Any, torch.save)(dict(content), file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    return cast(Any, torch.load)(path, map_location="cpu", weights_only=True)
