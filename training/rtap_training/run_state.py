"""Log and whole checkpoints of a training run, in the folder ``OUTPUT.run``.

Both survive a kill at any time: a truncated log line is dropped, and a checkpoint counts once its last file exists.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import git_commit, versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

COMPLETE_FILE = "complete.json"
"""The last file of a state; a state without it is ignored."""


def plain(config: "DataclassInstance") -> dict[str, Any]:
    """Fields of a config as JSON values."""
    return {name: str(v) if isinstance(v, Path | StrEnum) else v for name, v in asdict(config).items()}


def describe(settings: Mapping[str, Any]) -> str:
    """JSON of the settings, versions and commit that made a state."""
    record = {"config": dict(settings), "versions": versions(), "git_commit": git_commit()}
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
