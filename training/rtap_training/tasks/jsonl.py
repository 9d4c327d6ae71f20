"""Question files: JSON lines with ``question``, ``answer`` and optionally ``task`` and ``image``.

An invalid row is an error that names its line, because skipping rows would silently train on part of the file.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from rtap_core.errors import ConfigError
from rtap_training.tasks.base import PicturedQuestion, Question, Split, normalised, split_of

logger = logging.getLogger(__name__)
MAX_PATH = 1024  # longer text is base64, not a path


def question_split(question: str) -> Split:
    """Split of a question outside the bundled tasks, by its text without spaces and case."""
    return split_of(f"question:{normalised(question)}")


def distinct(questions: Iterable[Question], *, source: str) -> list[Question]:
    """Remove duplicates, which would weigh double; logs their number."""
    found: dict[str, Question] = {}
    total = 0
    for question in questions:
        total += 1
        found.setdefault(normalised(question.identity), question)
    if total > len(found):
        logger.warning("%s: %d duplicate questions; only the first of each is used", source, total - len(found))
    return list(found.values())


def read_questions(path: Path) -> list[Question]:
    """The distinct questions of a file; the task of a row without ``task`` is the file's name."""
    rows = distinct((row for _, row in read_rows(path, task=path.stem)), source=str(path))
    if not rows:
        raise ConfigError(f'{path} holds no questions; give rows like {{"question": "...", "answer": "..."}}')
    return rows


def read_rows(path: Path, *, task: str) -> Iterator[tuple[str, Question]]:
    """Every row with its ``FILE:LINE``; empty lines are skipped. Raises ConfigError."""
    try:
        # Not splitlines: a JSON string may contain Unicode line separators.
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
        raise ConfigError(f'{where}: each row must be an object like {{"question": "...", "answer": "..."}}')
    fields = cast(dict[str, Any], row)
    question, answer = (_text(fields.get(name)) for name in ("question", "answer"))
    for name, value in (("question", question), ("answer", answer)):
        if value is None:
            raise ConfigError(f'{where}: "{name}" is missing or empty; give it as text')
    named = fields.get("task")
    if named is not None and not isinstance(named, str):
        raise ConfigError(f'{where}: "task" must be text')
    image = fields.get("image")
    if image is None:
        return Question(question or "", answer or "", named or task)
    if not isinstance(image, str) or not image.strip():
        raise ConfigError(f'{where}: "image" must be the path of an image file, or a base64 image')
    is_file = len(image) < MAX_PATH and (folder / image).is_file()
    return PicturedQuestion(question or "", answer or "", named or task, str(folder / image) if is_file else image)


def _text(value: Any) -> str | None:
    """Text, or a number as text; None for anything else and for blank text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        return None
    return str(value)
