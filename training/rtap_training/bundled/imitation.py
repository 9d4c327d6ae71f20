"""Supervised training of a student on its teacher's right trajectories (``rtap train demo-imitate``).

A baseline of RLAD: here the teacher generates; in ``rtap train rlad`` it only scores the student's rollouts.
"""

from collections.abc import Sequence
from dataclasses import replace

from rtap_core.errors import ConfigError
from rtap_training.bundled.config import ImitateConfig
from rtap_training.bundled.data import Encoded
from rtap_training.bundled.own_cycles import PolicySetup, sampled_turns
from rtap_training.bundled.rows import TrainingRows, learn
from rtap_training.huggingface import load_policy, token_id
from rtap_training.rl.teacher import check_same_tokens
from rtap_training.rollout import Trajectory
from rtap_training.run_state import check_resumable
from rtap_training.runtime import configure_torch
from rtap_training.tasks.trajectory import TURN_END


def run(config: ImitateConfig) -> None:
    """Sample the teacher, train the student, evaluate it on held-out questions, save it, and print the metrics.

    Resumes from saved samples and the last state. Raises ConfigError if the tokenizers differ or the teacher is never
    right.
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
            f"the teacher {config.teacher} answered none of {config.questions} questions right; use another teacher"
        )
    learn("imitate", student, TrainingRows([row.ids for row in rows], len(rows), lambda _: list(rows)))


def right_turns(sampled: Sequence[Trajectory], end: int) -> list[Encoded]:
    """Each trajectory up to its first right cycle, then the end of turn. The prompt is masked."""
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
