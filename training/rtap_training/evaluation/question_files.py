"""Questions of JSONL files and of reasoning-gym, and their split into a calibration half and a test half."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training import tasks
from rtap_training.tasks import base
from rtap_training.tasks.gym import PREFIX, GymQuestion, read_dataset
from rtap_training.tasks.jsonl import read_rows

SLOT = "{question}"
GYM_PROMPT = SLOT + "\n\nReason briefly, then give the final answer in \\boxed{}."
SPLITS = CALIBRATION, TEST = ("calibration", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """One question. answer: reference answer for the checker of ``task``. template: prompt with ``{question}``.
    gym: the entry whose verifier judges answers, if the question comes from reasoning-gym."""

    text: str
    answer: str
    task: str
    template: str = SLOT
    gym: GymQuestion | None = None

    @property
    def prompt(self) -> str:
        """Text of the user's message."""
        return self.template.replace(SLOT, self.text)

    @property
    def split(self) -> str:
        """CALIBRATION, the half that also selects thresholds, or TEST. Salted: independent of the held-out split."""
        return SPLITS[hashlib.sha256(f"select:{self.text}".encode()).digest()[0] % 2]

    def is_right(self, answer: str | None) -> bool:
        """True if the verifier of the dataset, or the checker of the task, accepts the answer."""
        if answer is None:
            return False
        return tasks.is_right(self.gym or base.Question(self.text, self.answer, self.task), answer)

    def seed(self, base: int) -> int:
        """Sampling seed of this question for the evaluation seed ``base``; the same for every policy."""
        return int.from_bytes(hashlib.sha256(f"{base}:{self.text}".encode()).digest()[:4], "big") >> 1


def check_prompt(flag: str, template: str) -> None:
    """Raise ConfigError for a template without a place for the question. flag: what precedes it in the message."""
    if SLOT not in template:
        raise ConfigError(f"{flag}{template!r} has no {SLOT}; write it where the question belongs")


def load_questions(
    sources: Sequence[str | Path], *, limit: int | None = None, prompt: str | None = None, split: str | None = None
) -> dict[str, list[Question]]:
    """Questions of JSONL files and ``rg:NAME?option=value`` by task, in order, at most ``limit`` per task.

    The task of a row without ``task`` is the file's name. prompt: template; None: GYM_PROMPT for reasoning-gym, the
    question alone for files. split: one of SPLITS; None: all. Raises ConfigError with the file and line at fault.
    """
    if prompt is not None:
        check_prompt("--prompt ", prompt)
    by_task: dict[str, list[Question]] = {}
    seen: set[tuple[str, str]] = set()
    for source in sources:
        for where, question in _read(str(source), prompt):
            if (question.task, question.text) in seen:
                raise ConfigError(f"{where}: duplicate question; remove one of the two")
            seen.add((question.task, question.text))
            if split in (None, question.split):
                by_task.setdefault(question.task, []).append(question)
    if not by_task:
        raise ConfigError(f"no questions in {', '.join(map(str, sources))}; give JSONL rows with question and answer")
    return {task: rows[:limit] for task, rows in by_task.items()}


def _read(source: str, prompt: str | None) -> Iterator[tuple[str, Question]]:
    if source.startswith(PREFIX):
        for row in read_dataset(source):
            yield source, Question(row.question, row.answer, row.task, prompt or GYM_PROMPT, row)
    else:
        for where, row in read_rows(Path(source), task=Path(source).stem):
            yield where, Question(row.question, row.answer, row.task, prompt or SLOT)
