"""Question files, and their split into a selection half and a reporting half for thresholds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.tasks.jsonl import read_rows


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question file. answer: reference answer for the checker of ``task``."""

    text: str
    answer: str
    task: str

    @property
    def is_for_selection(self) -> bool:
        """True for the half that selects thresholds. Salted: independent of the train/held-out hash split."""
        return hashlib.sha256(f"select:{self.text}".encode()).digest()[0] % 2 == 0

    def seed(self, base: int) -> int:
        """Sampling seed of this question for the evaluation seed ``base``; the same for every policy."""
        return int.from_bytes(hashlib.sha256(f"{base}:{self.text}".encode()).digest()[:4], "big") >> 1


def load_questions(paths: Sequence[Path], *, limit: int | None = None) -> dict[str, list[Question]]:
    """Questions of all files by task, in file order, at most ``limit`` per task.

    The task of a row without ``task`` is the file's name. Raises ConfigError with the file and line at fault.
    """
    by_task: dict[str, list[Question]] = {}
    seen: set[tuple[str, str]] = set()
    for path in paths:
        for where, row in read_rows(path, task=path.stem):
            if (row.task, row.question) in seen:
                raise ConfigError(f"{where}: duplicate question; remove one of the two")
            seen.add((row.task, row.question))
            by_task.setdefault(row.task, []).append(Question(row.question, row.answer, row.task))
    if not by_task:
        raise ConfigError(f"no questions in {', '.join(map(str, paths))}; give JSONL rows with question and answer")
    return {task: rows[:limit] for task, rows in by_task.items()}
