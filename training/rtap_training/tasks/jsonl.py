"""A user's own questions: JSON lines with ``question``, ``answer`` and, where wanted, ``task`` or ``image``.

Anything that is no such row is an error that names its line: a run on half of a file would look like one on all of it.
Answers are checked by ``rtap_training.tasks.check``, not here.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rtap_core.answers import normalise_answer
from rtap_core.errors import ConfigError
from rtap_training.tasks.base import PicturedQuestion, Question, Split, split_of

logger = logging.getLogger(__name__)
MAX_PATH = 1024  # longer text is an image itself


@dataclass(frozen=True, slots=True)
class Distinct:
    """Questions without repetition, and how many repetitions were left out."""

    questions: list[Question]
    duplicates: int


def question_split(question: str) -> Split:
    """The split of a question that no bundled task made: by its text, blind to spaces and letter case."""
    return split_of(f"question:{normalise_answer(question)}")


def distinct(questions: Iterable[Question], *, source: str) -> Distinct:
    """Keep the first of each question, so that a repeated one cannot weigh double or stand in both splits."""
    found: dict[str, Question] = {}
    total = 0
    for question in questions:
        total += 1
        found.setdefault(normalise_answer(question.identity), question)
    if total > len(found):
        logger.warning("%s: %d repeated questions; only the first of each counts", source, total - len(found))
    return Distinct(list(found.values()), total - len(found))


def read_questions(path: Path) -> Distinct:
    """The distinct questions of a file; a row without ``task`` is of the task named like the file."""
    rows = distinct((row for _, row in read_rows(path, task=path.stem)), source=str(path))
    if not rows.questions:
        raise ConfigError(f'{path} holds no questions; give rows like {{"question": "...", "answer": "..."}}')
    return rows


def read_rows(path: Path, *, task: str) -> Iterator[tuple[str, Question]]:
    """Every row with where it is (``FILE:LINE``); empty lines are passed over. Raises ConfigError."""
    try:
        # Not splitlines: a line separator of Unicode may stand inside a JSON string.
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read the question file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the question file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse_row(line, where=where, task=task, folder=path.parent)


def _parse_row(line: str, *, where: str, task: str, folder: Path) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg}); each line must be one JSON object") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: JSON too deep; each line must be one flat JSON object") from error
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: a row must be an object like {{"question": "...", "answer": "..."}}')
    fields = cast(dict[str, Any], row)
    question, answer = (_text(fields.get(name)) for name in ("question", "answer"))
    for name, value in (("question", question), ("answer", answer)):
        if value is None:
            raise ConfigError(f'{where}: the row has no "{name}"; give it as text')
    named = fields.get("task")
    if named is not None and not isinstance(named, str):
        raise ConfigError(f'{where}: "task" must be text')
    image = fields.get("image")
    if image is None:
        return Question(question or "", answer or "", named or task)
    if not isinstance(image, str) or not image.strip():
        raise ConfigError(f'{where}: "image" must be the path of an image file, or base64 of one')
    is_file = len(image) < MAX_PATH and (folder / image).is_file()
    return PicturedQuestion(question or "", answer or "", named or task, str(folder / image) if is_file else image)


def _text(value: Any) -> str | None:
    """Text, or a number as text; None for anything else and for nothing but spaces."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        return None
    return str(value)
