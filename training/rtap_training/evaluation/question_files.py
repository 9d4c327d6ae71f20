"""Read question files and split questions into a half that selects a threshold and a half that reports it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.tasks.jsonl import read_rows


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question file. ``answer`` is the reference that the checker of ``task`` compares with."""

    text: str
    answer: str
    task: str

    @property
    def is_for_selection(self) -> bool:
        """Whether this question belongs to the half that chooses thresholds. Salted, so that it does not follow the
        hash split between training and held-out questions."""
        return hashlib.sha256(f"select:{self.text}".encode()).digest()[0] % 2 == 0

    def seed(self, base: int) -> int:
        """Sampling seed of this question in an evaluation with seed ``base``: the same for every policy."""
        return int.from_bytes(hashlib.sha256(f"{base}:{self.text}".encode()).digest()[:4], "big") >> 1


def load_questions(paths: Sequence[Path], *, limit: int | None = None) -> dict[str, list[Question]]:
    """Questions of all files by task, in file order, at most ``limit`` a task. A row without ``task`` is of the task
    named like its file. Raises ConfigError naming the file and line that is wrong."""
    by_task: dict[str, list[Question]] = {}
    seen: set[tuple[str, str]] = set()
    for path in paths:
        for where, row in read_rows(path, task=path.stem):
            if (row.task, row.question) in seen:
                raise ConfigError(f"{where}: this question appears twice; remove one of the two")
            seen.add((row.task, row.question))
            by_task.setdefault(row.task, []).append(Question(row.question, row.answer, row.task))
    if not by_task:
        raise ConfigError(f"no questions in {', '.join(map(str, paths))}; give JSONL rows with question and answer")
    return {task: rows[:limit] for task, rows in by_task.items()}
