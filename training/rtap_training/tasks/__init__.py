"""The bundled tasks by name, mixes of them, and one checker over all of them."""

from math import isfinite

from rtap_core.errors import ConfigError
from rtap_training.tasks.arithmetic import Arithmetic
from rtap_training.tasks.base import Task
from rtap_training.tasks.countdown import Countdown
from rtap_training.tasks.equivalence import same_answer
from rtap_training.tasks.knights import Knights

# Countdown before Arithmetic: its questions name a target, which arithmetic questions never do.
TASKS: dict[str, Task] = {task.name: task for task in (Countdown(), Arithmetic(), Knights())}


def task_of(question: str) -> Task | None:
    """The task a question belongs to, from its text alone."""
    return next((task for task in TASKS.values() if task.claims(question)), None)


def check(question: str, answer: str, reference: str) -> bool:
    """Whether ``answer`` is right: by the checker of the task the question belongs to, else by comparison with
    ``reference`` as text and as mathematics.

    A question of another origin may read like one of a bundled task ("a 3-page letter" holds an expression); then
    that task's checker does not accept the reference, and has no say.
    """
    task = task_of(question)
    if task is not None and (not reference or task.check(question, reference)):
        return task.check(question, answer)
    return same_answer(answer, reference)


def parse_mix(text: str) -> dict[str, float]:
    """Read ``countdown=0.5,knights=0.5``, or a name alone, as the share of each task; tasks of share 0 are left out.

    Shares are scaled to sum to 1. Raises ConfigError on anything else.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = (part.strip() for part in item.partition("="))
        if name not in TASKS:
            raise ConfigError(f"{text!r}: {name!r} is no task; choose from {', '.join(TASKS)}")
        if name in weights:
            raise ConfigError(f"{text!r} names {name} twice; name it once")
        weights[name] = _weight(number, text) if equals else 1.0
    total = sum(weights.values())
    if total == 0:
        raise ConfigError(f"{text!r} gives no task any weight; make one of them positive")
    return {name: weight / total for name, weight in weights.items() if weight}


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not isfinite(weight) or weight < 0:
        raise ConfigError(f"{text!r}: the weight {number!r} must be a number of at least 0")
    return weight
