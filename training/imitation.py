"""Teach a student what its teacher writes (``rtap train imitate``): supervised, on the teacher's right turns.

What RLAD is compared with: the teacher samples here, where in ``rtap train rlad`` it only scores what the student does.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from server.rtap.errors import ConfigError
from training.checkpoint import manifest, sha256
from training.config import ImitateConfig, run_dir
from training.data import Encoded
from training.held_out import show_held_out
from training.huggingface import load_policy
from training.own_cycles import Asked, build_sampler, clean_up, sample_training, training_problems
from training.rl.teacher import check_same_tokens
from training.rollout import Trajectory
from training.rows import train_on_rows
from training.runs import States, check_resumable, plain
from training.runtime import configure_torch
from training.sft import held_out_figures, save, write_held_out
from training.tasks.trajectory import TURN_END
from training.tokenizer import token_id


def run(config: ImitateConfig) -> None:
    """Sample the teacher, train the student, evaluate it on held-out questions, save it, and print the figures.

    Goes on from the run's last state, and from what was sampled, where there is something. Raises ConfigError for a
    teacher whose tokens are not the student's, or that is never right.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    student, tokenizer = load_policy(config.policy)
    teacher, theirs = load_policy(config.teacher)
    check_same_tokens(tokenizer, theirs)
    asked = Asked(teacher, theirs, replace(config, policy=config.teacher))
    _, questions = training_problems(config)
    with closing(build_sampler(asked)) as sampler:
        sampled = sample_training(asked, sampler, questions)
    rows = right_turns(sampled, token_id(tokenizer, TURN_END))
    if not rows:
        raise ConfigError(
            f"{config.teacher} answered none of {len(questions)} questions right; it has nothing to teach"
        )
    digest = json.dumps([row.ids for row in rows])
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(digest))
    training = train_on_rows("imitate", student, tokenizer, config, states, lambda _: list(rows))
    turns = write_held_out(student, tokenizer, tasks=config.tasks, count=config.eval_questions, seed=config.seed)
    show_held_out(config.output, training["steps"], turns, tokenizer)
    figures = training | {"rows": len(rows), "held_out": held_out_figures(turns)}
    record = manifest("rtap train imitate", config, data=digest, seconds=training["seconds"], figures=figures)
    save(config.output, student, tokenizer, record)
    clean_up(states)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


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
