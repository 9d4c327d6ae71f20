"""Confidence generator of the bundled policy (``rtap train demo-confidence``).

Sample the policy's cycles, label them with the tasks' checkers, train, calibrate, evaluate. Online updates during RL
are in ``rl/online_generator.py``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForSequenceClassification

from rtap_core.artifact import NUM_BINS, Logistic
from rtap_core.errors import ConfigError
from rtap_training.bundled.classifier import build_generator, build_scratch, logits_of
from rtap_training.bundled.config import ConfidenceConfig, Init, Loss
from rtap_training.bundled.held_out import HeldOutTrajectories, show_held_out
from rtap_training.bundled.judging import GENERATOR, Judged, judge_task, pool, report, score_cycles
from rtap_training.bundled.loop import Loop
from rtap_training.bundled.own_cycles import (
    PolicySetup,
    build_sampler,
    clean_up,
    sample,
    sample_training,
    training_problems,
)
from rtap_training.bundled.streams import Stream
from rtap_training.calibration import best_threshold, histogram
from rtap_training.checkpoint import manifest, sha256
from rtap_training.config import run_dir
from rtap_training.events import SHOWN, last_confidences
from rtap_training.examples import Example, Row, balance, collect, group, pair_batches, synthetic_texts
from rtap_training.huggingface import cast_to, encode_text, load_policy, save_checkpoint
from rtap_training.optim import build_muon
from rtap_training.questions import held_out_questions
from rtap_training.reliability import plot_png
from rtap_training.rollout import Sampler, Trajectory, encode_question
from rtap_training.run_state import States, check_resumable, plain
from rtap_training.runtime import configure_torch
from rtap_training.tasks import TASKS, parse_mix
from rtap_training.tasks.base import Problem


def run(config: ConfidenceConfig) -> None:
    """Sample, label, train, calibrate, evaluate on held-out questions, save, and print the metrics.

    Resumes from saved samples and the last state.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    setup = PolicySetup(*load_policy(config.policy), config)
    problems, questions = training_problems(config)
    with closing(build_sampler(setup)) as sampler:  # one sampler for all, because vLLM starts slowly
        sampled = sample_training(setup, sampler, questions)
        fitting = label(setup, problems, questions, sampled)
        held_out = sample_held_out(setup, sampler)
    digest = json.dumps([(e.ids, e.is_right, e.count) for e in fitting])
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(digest))
    configure_torch(config.threads, config.seed)  # weights depend on the seed alone, not on the amount of sampling
    depth = config.num_layers or None
    model = (
        build_scratch(setup.policy, depth)
        if config.init is Init.SCRATCH
        else build_generator(setup.policy, setup.tokenizer, depth)
    )
    training = train(model, fitting, config, states)
    cast_to(model, torch.bfloat16)  # evaluate the weights as they are saved
    cast_to(model, torch.float32)
    unseen = [t for t in sampled if t.question < num_validation(config)]
    known = score_cycles(model, setup.policy, setup.tokenizer, unseen, config.batch_tokens)
    # Not folded into the head: R-TAP's threshold of the confidence reward is of the head's own score.
    logistic = known.fit(("generator", "logprob_mean", "logprob_min") if config.fuse else ("generator",))
    threshold = best_threshold(known.confidences(logistic), known.labels)
    judged = judge(model, setup, held_out, logistic)
    figures: dict[str, Any] = training | {
        "threshold": threshold, "logistic": logistic.model_dump(),
        "examples": len(fitting), "held_out": report(judged),
    }  # fmt: skip
    show(setup, training["steps"], held_out, judged, figures["held_out"])
    model.config.rtap = artifact(threshold, logistic, judged, figures["held_out"]["all"])
    write_plot(run_dir(config.output) / "reliability.png", judged)
    record = manifest("rtap train demo-confidence", config, data=digest, seconds=training["seconds"], figures=figures)
    cast_to(model, torch.bfloat16)
    save_checkpoint(config.output, model, setup.tokenizer, record)
    clean_up(states)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


# Samples.


def sample_held_out(setup: PolicySetup[ConfidenceConfig], sampler: Sampler) -> dict[str, list[Trajectory]]:
    """Trajectories of each task's held-out questions, kept in files until the run succeeds."""
    config = setup.config
    size = f"{config.eval_questions}x{config.eval_samples}"  # may change when a run is resumed
    held_out: dict[str, list[Trajectory]] = {}
    for name in parse_mix(config.tasks):
        questions = [q.question for q in held_out_questions(TASKS[name], config.eval_questions)]
        file = run_dir(config.output) / f"held_out-{name}-{size}.jsonl"
        held_out[name] = sample(setup, sampler, file, questions, config.eval_samples, config.seed + 1)
    return held_out


def label(
    setup: PolicySetup[ConfidenceConfig],
    problems: Sequence[Problem],
    questions: Sequence[str],
    sampled: Sequence[Trajectory],
) -> list[Example]:
    """Weighted training examples. Raises ConfigError if they, or the sampled cycles that calibrate, lack right or wrong
    ones."""
    config, rng = setup.config, Random(f"{setup.config.seed}:synthetic")
    rows = [(t.question, (*t.prompt, *c.ids), c.is_right) for t in sampled for c in t.cycles if c.answer is not None]
    if not rows:
        raise ConfigError(
            f"{config.policy} finished no cycle of {len(questions)} questions; train it further with "
            "`rtap train demo-sft`"
        )
    validated = num_validation(config)
    synthetic: list[Row] = []
    for index in range(validated, len(questions)):
        prompt = encode_question(setup.tokenizer, questions[index])
        for text, is_right in synthetic_texts(problems[index], rng, config.synthetic_pairs):
            synthetic.append((index, (*prompt, *encode_text(setup.tokenizer, text)), is_right))
    validation = collect(row for row in rows if row[0] < validated)
    _check_contrast(validation, "the validation questions", "nothing to calibrate on")
    fitting = collect([*(row for row in rows if row[0] >= validated), *synthetic])
    _check_contrast(fitting, "the training questions", "nothing to learn")
    mixed = {e.question for e in fitting if e.is_right} & {e.question for e in fitting if not e.is_right}
    if config.loss is Loss.PAIRWISE and not mixed:
        raise ConfigError("no question has right and wrong answers to pair; take more samples, or loss=balanced")
    return balance(fitting, global_weight=config.global_weight)


def num_validation(config: ConfidenceConfig) -> int:
    """Number of questions, from the first, that are for calibration only."""
    return max(1, round(config.validation_share * config.questions))


def _check_contrast(examples: Sequence[Example], whose: str, so: str) -> None:
    num_right = sum(e.is_right for e in examples)
    if num_right in (0, len(examples)):
        raise ConfigError(
            f"{num_right} of {len(examples)} distinct answers to {whose} are right, so there is {so}; use a better "
            "policy (harder questions if all are right), more questions or more samples"
        )


# Training.


def train(
    model: Qwen3ForSequenceClassification, examples: Sequence[Example], config: ConfidenceConfig, states: States
) -> dict[str, Any]:
    """Train on shuffled epochs until the budget ends, from the last state if any."""
    optimisers = build_muon(
        model.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    mean_weight = sum(e.weight for e in examples) / len(examples)
    epoch_rows = 0

    def epoch(rng: Random) -> list[list[Example]]:
        nonlocal epoch_rows
        if config.loss is Loss.PAIRWISE:
            batches = pair_batches(examples, rng, config.batch_tokens)
        else:
            batches = group(rng.sample(examples, len(examples)), config.batch_tokens)
            rng.shuffle(batches)
        epoch_rows = sum(map(len, batches))
        return batches

    stream = Stream(epoch, seed=config.seed)
    model.train()
    with Loop("confidence", config, states, model=model, optimisers=optimisers, stream=stream) as loop:
        while loop.should_continue():
            batch = next(stream)
            logits = logits_of(model, batch)
            loss = pairwise_loss(logits) if config.loss is Loss.PAIRWISE else balanced_loss(logits, batch, mean_weight)
            loop.descend(loss, rows=len(batch), tokens=sum(len(e.ids) for e in batch))
    summary = loop.summary()
    return summary | {"epochs": round(summary["rows"] / max(1, epoch_rows), 2)}


def balanced_loss(logits: Tensor, batch: Sequence[Example], mean_weight: float) -> Tensor:
    """Weighted cross-entropy; ``mean_weight``: mean weight over an epoch."""
    labels = torch.tensor([float(e.is_right) for e in batch])
    weights = torch.tensor([e.weight / mean_weight for e in batch])
    return (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weights).mean()


def pairwise_loss(logits: Tensor) -> Tensor:
    """Mean of log(1 + exp(wrong - right)); logits (2 P,) alternate right and wrong cycles."""
    right, wrong = logits.reshape(-1, 2).unbind(1)
    return F.softplus(wrong - right).mean()


# Judgement.


def judge(
    model: Qwen3ForSequenceClassification,
    setup: PolicySetup[ConfidenceConfig],
    held_out: dict[str, list[Trajectory]],
    logistic: Logistic,
) -> dict[str, Judged]:
    """Scores of the held-out cycles, by task."""
    tokens = setup.config.batch_tokens
    return {
        name: judge_task(model, setup.policy, setup.tokenizer, part, tokens, logistic)
        for name, part in held_out.items()
    }


def artifact(
    threshold: float, logistic: Logistic, judged: dict[str, Judged], figures: dict[str, Any]
) -> dict[str, Any]:
    """The ``rtap`` block of config.json: server settings and held-out metrics.

    The reference histogram is over first cycles, which do not depend on the stop rule, so a server can compare its own.
    """
    scalars = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    firsts = [s for j in judged.values() for question in j.first_cycles for s in question if s.answer is not None]
    reference = histogram(np.array([s.scores[GENERATOR] for s in firsts], dtype=np.float64))
    calibration = {"bins": NUM_BINS, "reference": reference, "held_out": scalars}
    return {
        "format": "rtap", "kind": "confidence", "threshold": threshold, "calibration": calibration,
        "logistic": logistic.model_dump(),
    }  # fmt: skip


def show(
    setup: PolicySetup[ConfidenceConfig],
    step: int,
    held_out: Mapping[str, Sequence[Trajectory]],
    judged: Mapping[str, Judged],
    figures: Mapping[str, Any],
) -> None:
    """Write TensorBoard events: metrics per task and over all, and trajectories with their last confidence."""
    config = setup.config
    turns = {
        name: HeldOutTrajectories([q.question for q in held_out_questions(TASKS[name], config.eval_questions)], part)
        for name, part in held_out.items()
    }
    confidences = {name: last_confidences(part, judged[name].scores.tolist()) for name, part in held_out.items()}
    known = ((task, name, figures[task][name]) for task in figures for name in SHOWN)
    more = {f"held_out/{task}/confidence/{name}": value for task, name, value in known if value is not None}
    show_held_out(config.output, step, turns, setup.tokenizer, confidences=confidences, more=more)


def write_plot(file: Path, judged: dict[str, Judged]) -> None:
    """Write the reliability plot of every task and of all together."""
    parts = judged | {"all": pool(list(judged.values()))}
    png = plot_png({name: (p.scores, p.labels) for name, p in parts.items()}, "held-out questions, all cycles")
    file.write_bytes(png)
