"""Question files: fixed held-out sets as JSONL rows {"question", "answer", "task"} (``rtap train questions``)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from training.tasks import TASKS
from training.tasks.base import Split, Task, sample_split

HELD_OUT_SEED = 20_260_101


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a question file. ``answer`` is one right answer."""

    question: str
    answer: str
    task: str


def distinct_questions(task: Task, count: int, split: Split, rng: Random) -> list[Question]:
    """``count`` questions of different problems, each in a random phrasing."""
    seen: set[str] = set()
    questions: list[Question] = []
    while len(questions) < count:
        problem = sample_split(task, rng, split)
        if problem.canonical not in seen:
            seen.add(problem.canonical)
            questions.append(Question(problem.phrase(rng), problem.reference, task.name))
    return questions


def held_out_questions(task: Task, count: int) -> list[Question]:
    """The first ``count`` questions of the fixed held-out sequence of ``task``."""
    return distinct_questions(task, count, Split.HELD_OUT, Random(f"{HELD_OUT_SEED}:{task.name}"))


def write_held_out(folder: Path, count: int) -> list[Path]:
    """Write ``TASK.jsonl`` for every task; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for task in TASKS.values():
        path = folder / f"{task.name}.jsonl"
        rows = (json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in held_out_questions(task, count))
        path.write_text("".join(rows), "utf-8")
        paths.append(path)
    return paths
