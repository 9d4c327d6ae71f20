"""Training and held-out questions from bundled tasks, JSONL files, reasoning-gym or Hugging Face datasets.

Also writes the fixed held-out files, JSONL rows {"question", "answer", "task"} (``rtap train questions``).
"""

import json
from dataclasses import asdict
from pathlib import Path
from random import Random

from rtap_core.answers import extract_answer
from rtap_core.errors import ConfigError
from rtap_training import tasks
from rtap_training.evaluation.question_files import GYM_PROMPT, SLOT
from rtap_training.tasks import TASKS, gym, parse_mix
from rtap_training.tasks.base import Question, Split, Task, sample_split
from rtap_training.tasks.hub import load_dataset_questions
from rtap_training.tasks.jsonl import question_split, read_questions

HELD_OUT_SEED = 20_260_101
HUB = "hf:"


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
    """Write ``TASK.jsonl`` for every task, deterministically."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for task in TASKS.values():
        path = folder / f"{task.name}.jsonl"
        rows = (json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in held_out_questions(task, count))
        path.write_text("".join(rows), "utf-8")
        paths.append(path)
    return paths


def load_questions(spec: str, split: Split, *, seed: int, count: int) -> list[Question]:
    """``count`` different questions of ``split`` in random order, or all if there are fewer.

    ``spec``: a bundled task, a mix (``countdown=0.5,knights=0.5``), a JSONL file (``questions.jsonl``; any path with a
    folder), a dataset of reasoning-gym (``rg:NAME?option=value``) or of Hugging Face (``hf:openai/gsm8k``).
    Raises ConfigError.
    """
    rng, questions = Random(f"{seed}:{spec}"), list[Question]()
    if spec.startswith(HUB):
        questions += load_dataset_questions(spec.removeprefix(HUB), split)
    elif spec.startswith(gym.PREFIX):
        questions += (q for q in gym.read_dataset(spec) if question_split(q.identity) is split)
    elif spec.endswith((".jsonl", ".json")) or "/" in spec:
        questions += (q for q in read_questions(Path(spec)) if question_split(q.identity) is split)
    else:
        questions += _sample_mix(spec, split, count, rng)
    if not questions:
        raise ConfigError(f"{spec} has no {split.value} question; a tenth is held out by hash, so add more questions")
    rng.shuffle(questions)
    return questions[:count]


def message(question: Question, template: str) -> str:
    """The user's message. Without a template it is the question; questions of reasoning-gym also ask for a box."""
    return (template or (GYM_PROMPT if isinstance(question, gym.GymQuestion) else SLOT)).replace(
        SLOT, question.question
    )


def is_right(question: Question, text: str) -> bool:
    """True if the final answer of a text is right."""
    return tasks.is_right(question, extract_answer(text) or text)


def _sample_mix(spec: str, split: Split, count: int, rng: Random) -> list[Question]:
    try:
        weights = parse_mix(spec)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give a .jsonl file, {gym.PREFIX}NAME or {HUB}DATASET") from error
    names = rng.choices(list(weights), list(weights.values()), k=count)
    return [q for name in weights for q in distinct_questions(TASKS[name], names.count(name), split, rng)]
