"""Registry of the bundled tasks, task mixes, and an answer checker for any question."""

from math import isfinite

from rtap_core.errors import ConfigError
from rtap_training.tasks import gym
from rtap_training.tasks.arithmetic import Arithmetic
from rtap_training.tasks.base import Question, Task
from rtap_training.tasks.countdown import Countdown
from rtap_training.tasks.equivalence import same_answer
from rtap_training.tasks.knights import Knights

# Countdown precedes Arithmetic: only its questions name a target.
TASKS: dict[str, Task] = {task.name: task for task in (Countdown(), Arithmetic(), Knights())}


def task_of(question: str) -> Task | None:
    """Task of a question, derived from its text."""
    return next((task for task in TASKS.values() if task.claims(question)), None)


def check(question: str, answer: str, reference: str) -> bool:
    """Return True if ``answer`` is right.

    The checker of the question's bundled task decides; otherwise ``answer`` is compared with ``reference`` as text and
    as mathematics. A foreign question may look like a bundled task ("a 3-page letter" contains an expression); a task's
    checker is used only if it accepts the reference.
    """
    task = task_of(question)
    if task is not None and (not reference or task.check(question, reference)):
        return task.check(question, answer)
    return same_answer(answer, reference)


def is_right(question: Question, answer: str) -> bool:
    """True if the verifier of the question's dataset, or the checker of its task, accepts the answer."""
    if isinstance(question, gym.GymQuestion):
        return gym.is_right(question, answer)
    return check(question.question, answer, question.answer)


def parse_mix(text: str) -> dict[str, float]:
    """Parse ``countdown=0.5,knights=0.5`` or a single name into task shares; tasks with share 0 are omitted.

    Shares are scaled to sum to 1. Raises ConfigError on anything else.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if name not in TASKS:
            raise ConfigError(f"{text!r}: {name!r} is not a task; choose from {', '.join(TASKS)}")
        if name in weights:
            raise ConfigError(f"{text!r} names {name} twice; name it once")
        weights[name] = _weight(number, text) if equals else 1.0
    total = sum(weights.values())
    if total == 0:
        raise ConfigError(f"{text!r}: all weights are 0; make one of them positive")
    return {name: weight / total for name, weight in weights.items() if weight}


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not isfinite(weight) or weight < 0:
        raise ConfigError(f"{text!r}: the weight {number!r} must be a number of at least 0")
    return weight
