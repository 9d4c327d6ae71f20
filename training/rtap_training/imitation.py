"""Teach a student what its teacher writes (``rtap train imitate``): supervised, on the teacher's right turns.

What RLAD is compared with: the teacher samples here, where in ``rtap train rlad`` it only scores what the student does.
"""

from collections.abc import Sequence
from dataclasses import replace

from rtap_core.errors import ConfigError
from rtap_training.config import ImitateConfig
from rtap_training.data import Encoded
from rtap_training.huggingface import load_policy, token_id
from rtap_training.own_cycles import PolicySetup, sampled_turns
from rtap_training.rl.teacher import check_same_tokens
from rtap_training.rollout import Trajectory
from rtap_training.rows import TrainingRows, learn
from rtap_training.run_state import check_resumable
from rtap_training.runtime import configure_torch
from rtap_training.tasks.trajectory import TURN_END


def run(config: ImitateConfig) -> None:
    """Sample the teacher, train the student, evaluate it on held-out questions, save it, and print the figures.

    Goes on from the run's last state, and from what was sampled, where there is something. Raises ConfigError for a
    teacher whose tokens are not the student's, or that is never right.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    student = PolicySetup(*load_policy(config.policy), config)
    teacher = PolicySetup(*load_policy(config.teacher), replace(config, policy=config.teacher))
    check_same_tokens(student.tokenizer, teacher.tokenizer)
    _, sampled = sampled_turns(teacher)
    rows = right_turns(sampled, token_id(student.tokenizer, TURN_END))
    if not rows:
        raise ConfigError(
            f"{config.teacher} answered none of {config.questions} questions right; it has nothing to teach"
        )
    learn("imitate", student, TrainingRows([row.ids for row in rows], len(rows), lambda _: list(rows)))


def right_turns(sampled: Sequence[Trajectory], end: int) -> list[Encoded]:
    """Every turn up to its first right cycle, then the end of the turn; the question is not learnt."""
    rows: list[Encoded] = []
    for trajectory in sampled:
        written: list[int] = []
        for cycle in trajectory.cycles:
            written += cycle.ids
            if cycle.is_right:
                ids = [*trajectory.prompt, *written, end]
                rows.append(Encoded(ids, [i >= len(trajectory.prompt) for i in range(len(ids))]))
                break
    return rows
