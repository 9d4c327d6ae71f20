"""What a reinforcement-learning run has beside TRL."""

from collections.abc import Callable
from dataclasses import dataclass

from rtap_training.rl.online_generator import OnlineGenerator
from rtap_training.rl.rollouts import Dialect
from rtap_training.rl.teacher import Teacher


@dataclass(slots=True)
class RunComponents:
    """What a run has beside TRL. generator, teacher: None where the objective needs none.

    check: whether an answer to the question in that row of the dataset is right. record: text of ``complete.json``,
    which marks a checkpoint as whole.
    """

    dialect: Dialect
    check: Callable[[int, str], bool]
    generator: OnlineGenerator | None
    teacher: Teacher | None
    record: Callable[[], str]
