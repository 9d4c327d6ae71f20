"""Components of a reinforcement-learning run that TRL does not provide."""

from collections.abc import Callable
from dataclasses import dataclass

from rtap_training.models.online_generator import OnlineGenerator
from rtap_training.models.teacher import Teacher
from rtap_training.rl.rollouts import Dialect


@dataclass(slots=True)
class RunComponents:
    """Components of a run. generator, teacher: None if the objective does not use one.

    check: (dataset row, answer) -> True if right. record: text of ``complete.json``, which marks complete checkpoints.
    """

    dialect: Dialect
    check: Callable[[int, str], bool]
    generator: OnlineGenerator | None
    teacher: Teacher | None
    record: Callable[[], str]
