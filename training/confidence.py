"""Train a confidence generator on a policy's own cycles (``rtap train confidence``).

Not here: the online updates during RL (``training/rl/generator.py``).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from server.rtap.errors import ConfigError
from training.calibration import NUM_BINS, best_threshold, figures, histogram, sigmoid
from training.checkpoint import manifest, sha256
from training.classifier import Scored, build_generator, calibrate, logits_of, score
from training.config import ConfidenceConfig
from training.examples import Example, Row, balance, collect, group, synthetic_texts
from training.huggingface import cast_to, encode_text, load_policy, save_checkpoint
from training.loop import Loop
from training.optim import build_muon
from training.questions import held_out_questions
from training.rollout import encode_question, sample_trajectories
from training.runs import States, check_resumable, plain, run_dir
from training.runtime import configure_torch
from training.samples import read_or_sample
from training.streams import Stream
from training.tasks import TASKS, parse_mix
from training.tasks.base import Problem, Split, sample_split


def run(config: ConfidenceConfig) -> None:
    """Sample, label, train, calibrate, judge on held-out questions, save, and print the figures.

    Goes on from the run's last state where there is one.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    policy, tokenizer = load_policy(config.policy)
    generator = torch.Generator().manual_seed(config.seed)
    fitting, validation = training_examples(policy, tokenizer, config, generator)
    num_right = sum(e.is_right for e in validation)
    if num_right in (0, len(validation)):
        raise ConfigError(
            f"{num_right} of {len(validation)} distinct answers to the validation questions are right, so there is "
            "nothing to calibrate on; take a better policy or more questions"
        )
    digest = json.dumps([(e.ids, e.is_right) for e in fitting])
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(digest))
    model = build_generator(policy, tokenizer)
    training = train(model, balance(fitting, global_weight=config.global_weight), config, states)
    calibration = calibrate(model, score(model, validation, config.batch_tokens))
    judged = score(model, validation, config.batch_tokens)
    threshold = best_threshold(sigmoid(judged.logits), judged.labels)
    held_out, reference = judge(model, policy, tokenizer, config)
    figures_all = training | {
        "threshold": threshold, "calibration": calibration, "examples": len(fitting), "held_out": held_out,
    }  # fmt: skip
    model.config.rtap = {
        "format": "rtap",
        "kind": "confidence",
        "threshold": threshold,
        "calibration": {"bins": NUM_BINS, "reference": reference, "held_out": held_out["all"]},
    }
    record = manifest("rtap train confidence", config, data=digest, seconds=training["seconds"], figures=figures_all)
    cast_to(model, torch.bfloat16)
    save_checkpoint(config.output, model, tokenizer, record)
    states.remove()
    sys.stdout.write(json.dumps(figures_all, indent=2) + "\n")


def training_examples(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: ConfidenceConfig, generator: torch.Generator
) -> tuple[list[Example], list[Example]]:
    """Labelled cycles of training questions: to fit on, and (sampled ones only) to calibrate on."""
    rng = Random(config.seed)
    problems, questions = _training_problems(config, rng)
    sampled = read_or_sample(config, lambda: sample_rows(policy, tokenizer, questions, config, generator))
    num_validation = max(1, round(config.validation_share * len(questions)))
    synthetic: list[Row] = []
    for index in range(num_validation, len(questions)):
        prompt = encode_question(tokenizer, questions[index])
        for text, is_right in synthetic_texts(problems[index], rng, config.synthetic_pairs):
            ids = encode_text(tokenizer, text)
            synthetic.append((index, (*prompt, *ids), is_right))
    fitting = [row for row in sampled if row[0] >= num_validation] + synthetic
    return collect(fitting), collect(row for row in sampled if row[0] < num_validation)


def _training_problems(config: ConfidenceConfig, rng: Random) -> tuple[list[Problem], list[str]]:
    """Training problems and a phrasing of each, tasks interleaved."""
    shares = parse_mix(config.tasks)
    problems: list[Problem] = []
    questions: list[str] = []
    for _ in range(config.questions):
        name = rng.choices(list(shares), list(shares.values()))[0]
        problem = sample_split(TASKS[name], rng, Split.TRAIN)
        problems.append(problem)
        questions.append(problem.phrase(rng))
    return problems, questions


def sample_rows(
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    config: ConfidenceConfig,
    generator: torch.Generator,
) -> list[Row]:
    """Every complete cycle of the sampled trajectories, each alone with its question."""

    def check(index: int, answer: str) -> bool:
        return any(task.check(questions[index], answer) for task in TASKS.values())

    trajectories = sample_trajectories(
        policy, tokenizer, questions, check,
        samples=config.samples, max_cycles=config.max_cycles, generator=generator,
    )  # fmt: skip
    return [
        (t.question, (*t.prompt, *cycle.ids), cycle.is_right)
        for t in trajectories
        for cycle in t.cycles
        if cycle.answer is not None
    ]


def train(
    model: Qwen3ForSequenceClassification, examples: Sequence[Example], config: ConfidenceConfig, states: States
) -> dict[str, Any]:
    """Weighted cross-entropy over shuffled epochs until the budget ends; from the last state where there is one."""
    optimisers = build_muon(
        model.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    mean_weight = sum(e.weight for e in examples) / len(examples)

    def epoch(rng: Random) -> list[list[Example]]:
        batches = group(rng.sample(examples, len(examples)), config.batch_tokens)
        rng.shuffle(batches)
        return batches

    stream = Stream(epoch, seed=config.seed)
    model.train()
    with Loop("confidence", config, states, model=model, optimisers=optimisers, stream=stream) as loop:
        while loop.goes_on():
            batch = next(stream)
            labels = torch.tensor([float(e.is_right) for e in batch])
            weights = torch.tensor([e.weight / mean_weight for e in batch])
            losses = F.binary_cross_entropy_with_logits(logits_of(model, batch), labels, reduction="none")
            loop.descend((losses * weights).mean(), rows=len(batch), tokens=sum(len(e.ids) for e in batch))
    summary = loop.summary()
    return summary | {"epochs": round(summary["rows"] / len(examples), 2)}


def judge(
    model: Qwen3ForSequenceClassification,
    policy: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: ConfidenceConfig,
) -> tuple[dict[str, Any], list[float]]:
    """Held-out figures, on the bf16-rounded weights that are saved, and the histogram of all scores."""
    cast_to(model, torch.bfloat16)
    cast_to(model, torch.float32)
    generator = torch.Generator().manual_seed(config.seed + 1)  # the same samples whether or not others were reused
    report: dict[str, Any] = {}
    parts: list[Scored] = []
    for name in parse_mix(config.tasks):
        questions = [q.question for q in held_out_questions(TASKS[name], config.eval_questions)]
        rows = sample_rows(policy, tokenizer, questions, config, generator)
        scored = score(model, collect(rows), config.batch_tokens)
        report[name] = asdict(figures(sigmoid(scored.logits), scored.labels, scored.questions))
        parts.append(scored)
    scores = sigmoid(np.concatenate([p.logits for p in parts]))
    labels = np.concatenate([p.labels for p in parts])
    # The tasks' questions must not be mixed up: each part's indices follow those of the one before.
    questions_all = [q + config.eval_questions * i for i, p in enumerate(parts) for q in p.questions]
    report["all"] = asdict(figures(scores, labels, questions_all))
    return report, histogram(scores)
