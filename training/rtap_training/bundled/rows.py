"""Supervised training on rows of token ids, redrawn every epoch; shared by ``demo-correct`` and ``demo-imitate``."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from rtap_training.bundled.config import SampledTurnsConfig
from rtap_training.bundled.data import Batch, Encoded, bucket, pad, policy_loss
from rtap_training.bundled.held_out import HeldOutTrajectories, held_out_figures, show_held_out, write_held_out
from rtap_training.bundled.loop import Loop, save
from rtap_training.bundled.own_cycles import PolicySetup, clean_up
from rtap_training.bundled.streams import Stream
from rtap_training.checkpoint import manifest, sha256
from rtap_training.config import run_dir
from rtap_training.huggingface import pad_id
from rtap_training.optim import build_muon
from rtap_training.run_state import States, plain
from rtap_training.runtime import configure_torch

Config = TypeVar("Config", bound=SampledTurnsConfig)


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows to train on. ids: of all rows, as JSON. counts: for the manifest. draw: return the rows of one epoch."""

    ids: list[Any]
    counts: int | dict[str, int]
    draw: Callable[[Random], list[Encoded]]


def learn(name: str, setup: PolicySetup[Config], rows: TrainingRows, *, evaluate_before: bool = False) -> None:
    """Train from the last state, if any; then evaluate on held-out questions, save, and print the metrics.

    evaluate_before: also evaluate before training.
    """
    policy, tokenizer, config = setup.policy, setup.tokenizer, setup.config
    data = json.dumps(rows.ids)
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(data))
    before = {"before": held_out_figures(_write_held_out(setup))} if evaluate_before else {}
    training = _train(name, setup, states, rows.draw)
    turns = _write_held_out(setup)
    show_held_out(config.output, training["steps"], turns, tokenizer)
    figures = training | {"rows": rows.counts} | before | {"held_out": held_out_figures(turns)}
    record = manifest(f"rtap train demo-{name}", config, data=data, seconds=training["seconds"], figures=figures)
    save(config.output, policy, tokenizer, record)
    clean_up(states)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def _write_held_out(setup: PolicySetup[Config]) -> dict[str, HeldOutTrajectories]:
    config = setup.config
    return write_held_out(
        setup.policy, setup.tokenizer, tasks=config.tasks, count=config.eval_questions, seed=config.seed
    )


def _train(
    name: str, setup: PolicySetup[Config], states: States, draw: Callable[[Random], list[Encoded]]
) -> dict[str, Any]:
    policy, config, padding = setup.policy, setup.config, pad_id(setup.tokenizer)
    optimisers = build_muon(
        policy.named_parameters(), matrix_rate=config.matrix_rate, learning_rate=config.learning_rate, weight_decay=0.0
    )

    def epoch(rng: Random) -> list[Batch]:
        drawn = draw(rng)
        rng.shuffle(drawn)
        groups = bucket(drawn, config.batch_tokens)
        rng.shuffle(groups)
        return [pad(group, padding) for group in groups]

    stream = Stream(epoch, seed=config.seed)
    configure_torch(config.threads, config.seed)  # the same random state whether or not samples were read from a file
    policy.train()
    with Loop(name, config, states, model=policy, optimisers=optimisers, stream=stream) as loop:
        while loop.should_continue():
            batch = next(stream)
            loop.descend(policy_loss(policy, batch), rows=len(batch.ids), tokens=batch.ids.numel())
    return loop.summary()
