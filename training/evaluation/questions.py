"""Read question files and split questions into a half that selects a threshold and a half that reports it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from server.rtap.errors import ConfigError


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
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"cannot read the question file {path}: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            question = _parse_row(line, where=f"{path}:{number}", task=path.stem)
            if (question.task, question.text) in seen:
                raise ConfigError(f"{path}:{number}: this question appears twice; remove one of the two")
            seen.add((question.task, question.text))
            by_task.setdefault(question.task, []).append(question)
    if not by_task:
        raise ConfigError(f"no questions in {', '.join(map(str, paths))}; give JSONL rows with question and answer")
    return {task: rows[:limit] for task, rows in by_task.items()}


def _parse_row(line: str, *, where: str, task: str) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: a row must be an object like {{"question": "...", "answer": "..."}}')
    fields = cast(dict[str, Any], row)
    for name in ("question", "answer"):
        if not isinstance(fields.get(name), str | int | float):
            raise ConfigError(f'{where}: the row has no "{name}"; give it as text')
    return Question(str(fields["question"]), str(fields["answer"]), str(fields.get("task") or task))
