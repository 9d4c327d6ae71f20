"""Train a confidence generator on a policy's own cycles (``rtap train confidence``).

Input: the prompt of the question and **one** cycle, ending at ``</answer>``; earlier cycles are not seen (the paper's
form). The policy's weights with a one-label head; the last token is pooled. Not here: the online updates during RL.
"""

import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification, Qwen3Model

from server.rtap.errors import ConfigError
from server.rtap.format import RTAP
from training.calibration import (
    NUM_BINS,
    Bools,
    Floats,
    best_threshold,
    constant_direction,
    figures,
    fit_platt,
    histogram,
    sigmoid,
)
from training.checkpoint import manifest
from training.config import ConfidenceConfig
from training.examples import Example, Row, balance, collect, synthetic_texts
from training.huggingface import cast_to, encode_text, load_policy, load_tokenizer, save_checkpoint
from training.optim import Budget, build_muon, descend, schedule
from training.progress import Progress
from training.questions import held_out_questions
from training.rollout import encode_question, sample_trajectories
from training.runtime import configure_torch
from training.samples import read_or_sample
from training.tasks import TASKS, parse_mix
from training.tasks.base import Problem, Split, sample_split
from training.tasks.trajectory import TURN_END
from training.tokenizer import token_id

WARMUP_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Scored:
    """Pooled features (N, D) and logits (N,) of cycles, with labels and question indices."""

    hidden: Floats
    logits: Floats
    labels: Bools
    questions: list[int]


def run(config: ConfidenceConfig) -> None:
    """Sample, label, train, calibrate, judge on held-out questions, save, and print the figures."""
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
    model = build_generator(policy, tokenizer)
    training = train(model, balance(fitting, global_weight=config.global_weight), config)
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
    digest = json.dumps([(e.ids, e.is_right) for e in fitting])
    record = manifest("rtap train confidence", config, data=digest, seconds=training["seconds"], figures=figures_all)
    cast_to(model, torch.bfloat16)
    save_checkpoint(config.output, model, tokenizer, record)
    sys.stdout.write(json.dumps(figures_all, indent=2) + "\n")


def build_generator(policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForSequenceClassification:
    """The policy's body; the head starts as the policy's own choice after a cycle: end the turn against go on.

    Training then starts from what the policy knows of its answers (within-question AUROC 0.92 on held-out Countdown)
    instead of spending its first steps, and its features, on a random head.
    """
    settings = deepcopy(policy.config)
    settings.num_labels = 1
    model = Qwen3ForSequenceClassification(settings)
    body_of(model).load_state_dict(policy.model.state_dict())
    outputs = policy.lm_head.weight.detach()
    with torch.no_grad():
        model.score.weight[0] = outputs[token_id(tokenizer, TURN_END)] - outputs[token_id(tokenizer, RTAP.cycle_open)]
    return model


def load_generator(path: Path) -> tuple[Qwen3ForSequenceClassification, PreTrainedTokenizerFast]:
    """A trained generator in fp32, and its tokenizer."""
    loaded = cast(Any, Qwen3ForSequenceClassification).from_pretrained(path, dtype=torch.float32)
    return cast(Qwen3ForSequenceClassification, loaded).eval(), load_tokenizer(path)


def body_of(model: Qwen3ForSequenceClassification) -> Qwen3Model:
    """The transformer below the head."""
    return cast(Qwen3Model, cast(Any, model).model)


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


def pooled(model: Qwen3ForSequenceClassification, examples: Sequence[Example]) -> Tensor:
    """Hidden state of each example's last token, right-padded batch: (B, D)."""
    pad_id = cast(int, model.config.pad_token_id)
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([[*e.ids, *[pad_id] * (width - len(e.ids))] for e in examples])
    hidden = cast(Tensor, body_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    last = torch.tensor([len(e.ids) - 1 for e in examples])
    return hidden[torch.arange(len(examples)), last]


def group(examples: Sequence[Example], batch_tokens: int) -> list[list[Example]]:
    """Batches of similar length."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: len(e.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    return groups


def train(
    model: Qwen3ForSequenceClassification, examples: Sequence[Example], config: ConfidenceConfig
) -> dict[str, Any]:
    """Weighted cross-entropy over shuffled epochs until the budget ends."""
    optimisers = build_muon(
        model.named_parameters(),
        matrix_rate=config.matrix_rate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    rng = Random(config.seed)
    mean_weight = sum(e.weight for e in examples) / len(examples)
    budget, num_seen = Budget(config.minutes, config.max_steps), 0
    queue: list[list[Example]] = []
    model.train()
    with Progress("confidence", config.output, budget) as progress:
        while budget.progress < 1:
            if not queue:
                queue = group(rng.sample(examples, len(examples)), config.batch_tokens)
                rng.shuffle(queue)
            batch = queue.pop()
            logits = model.score(pooled(model, batch))[:, 0]
            labels = torch.tensor([float(e.is_right) for e in batch])
            weights = torch.tensor([e.weight / mean_weight for e in batch])
            loss = (F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weights).mean()
            descend(loss, optimisers, factor=schedule(budget.progress, warmup_share=WARMUP_SHARE))
            budget.steps += 1
            num_seen += len(batch)
            progress.record(loss.item(), rows=len(batch), tokens=sum(len(e.ids) for e in batch))
    return progress.summary() | {"epochs": round(num_seen / len(examples), 2)}


@torch.inference_mode()
def score(model: Qwen3ForSequenceClassification, examples: Sequence[Example], batch_tokens: int) -> Scored:
    """Score distinct cycles once and repeat them as often as they were sampled."""
    model.eval()
    ordered = [e for g in group(examples, batch_tokens) for e in g]
    hidden = torch.cat([pooled(model, g) for g in group(examples, batch_tokens)])
    logits = model.score(hidden)[:, 0]
    times = np.array([e.count for e in ordered])
    return Scored(
        np.repeat(hidden.double().numpy(), times, axis=0),
        np.repeat(logits.double().numpy(), times),
        np.repeat(np.array([e.is_right for e in ordered]), times),
        [e.question for e in ordered for _ in range(e.count)],
    )


def calibrate(model: Qwen3ForSequenceClassification, scored: Scored) -> dict[str, float]:
    """Fold a Platt fit into the head, so that every engine serves calibrated scores with no code of ours."""
    slope, offset = fit_platt(scored.logits, scored.labels)
    direction = constant_direction(scored.hidden)
    residual = float(np.std(scored.hidden @ direction))
    with torch.no_grad():
        weight = slope * model.score.weight[0].double().numpy() + offset * direction
        model.score.weight[0] = torch.tensor(weight, dtype=torch.float32)
    return {"slope": round(slope, 4), "offset": round(offset, 4), "offset_spread": round(residual, 5)}


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
