"""Train a confidence generator for any Hugging Face model on a user's own questions (``rtap train generator``).

Sample the model in its own chat template and trajectory format, label by the checkers, train, calibrate, judge. The
bundled models' generator has a command of its own (``training/confidence.py``), with made-up cycles, a second witness
and resumption. Not here: the loop that is sampled (``training/rl/rollouts.py``), and one step
(``training/rl/generator.py``).
"""

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from time import monotonic
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from server.rtap.artifact import CERTAIN, NUM_BINS, Fusion
from server.rtap.errors import ConfigError
from training.calibration import Bools, Floats, best_threshold, figures, fit_platt, histogram, sigmoid
from training.checkpoint import manifest
from training.config import run_dir
from training.events import TAG, Sample, add_events, open_events
from training.generator_config import GeneratorConfig
from training.huggingface import cast_to, save_checkpoint
from training.questions import Question, load_questions
from training.rl.generator import LabelledCycle, OnlineGenerator, labelled_cycles
from training.rl.loading import Loaded, load_for_training
from training.rl.lockstep import Request, Written
from training.rl.rollouts import Asked, Rollout, roll_out
from training.runtime import configure_torch
from training.tasks import check
from training.tasks.base import Split


@dataclass(frozen=True, slots=True)
class Cycles:
    """Scored cycles in the order of their rollouts. logits: of the generator alone."""

    logits: Floats
    labels: Bools
    questions: list[int]
    is_first: Bools


def run(config: GeneratorConfig) -> None:
    """Sample, train, calibrate, judge on held-out questions, save, and print the figures. Raises ConfigError."""
    configure_torch(config.threads, config.seed)
    started = monotonic()
    fitting, validation, held_out = _questions(config)
    loaded = load_for_training(config.policy)
    if loaded.sees_images:
        raise ConfigError(f"{config.policy} is a vision-language model; a generator reads text alone")
    sampled = [_sample(loaded, part, config) for part in (fitting, validation, held_out)]
    _check_contrast(sampled[0], "training")
    _check_contrast(sampled[1], "validation")
    dialect, tokenizer = loaded.dialect, loaded.tokenizer
    del loaded
    gc.collect()
    model = _fresh(config, pad_id=cast(int, tokenizer.pad_token_id))
    generator = OnlineGenerator(
        model, learning_rate=config.learning_rate, iterations=1, global_weight=config.global_weight, average=_alone
    )
    curve = _train(generator, labelled_cycles(sampled[0]), config)
    cast_to(model, torch.bfloat16)  # what is saved is what is judged
    cast_to(model, torch.float32)
    known, unseen = _score(generator, sampled[1]), _score(generator, sampled[2])
    slope, offset = fit_platt(known.logits, known.labels)
    threshold = best_threshold(sigmoid(slope * known.logits + offset), known.labels)
    confidences = sigmoid(slope * unseen.logits + offset)
    judged = asdict(figures(confidences, unseen.labels, unseen.questions))
    fusion = Fusion(bias=round(offset, 4), generator=round(slope, 4), logprob_mean=0.0, logprob_min=0.0)
    calibration = {"bins": NUM_BINS, "reference": histogram(confidences[unseen.is_first]), "held_out": judged}
    cast(Any, model.config).rtap = {
        "format": dialect.format.name, "kind": "confidence", "threshold": threshold, "fusion": fusion.model_dump(),
        "calibration": calibration,
    }  # fmt: skip
    summary = {"steps": len(curve), "loss": round(curve[-1], 4), "threshold": threshold, "held_out": judged}
    _show(config, curve, judged, held_out, sampled[2], confidences)
    data = "\n".join(q.identity for q in (*fitting, *validation))
    record = manifest("rtap train generator", config, data=data, seconds=monotonic() - started, figures=summary)
    cast_to(model, torch.bfloat16)
    save_checkpoint(config.output, model, tokenizer, record)
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


def _alone(_: Sequence[Tensor]) -> None:
    """The mean over one process."""


def _questions(config: GeneratorConfig) -> tuple[list[Question], list[Question], list[Question]]:
    """To fit on, to calibrate on, and to judge on; no question in two of them."""
    known = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    held_out = load_questions(config.questions, Split.HELD_OUT, seed=config.seed, count=config.eval_questions)
    kept = max(1, round(config.validation_share * len(known)))
    if kept >= len(known):
        raise ConfigError(f"{config.questions} has {len(known)} training questions; give more")
    return known[kept:], known[:kept], held_out


# Samples.


def _sample(loaded: Loaded, questions: Sequence[Question], config: GeneratorConfig) -> list[Rollout]:
    """``samples`` trajectories of every question, those of one side by side."""

    def ask(index: int, question: Question) -> Asked:
        def is_right(answer: str) -> bool:
            return check(question.question, answer, question.answer)

        return Asked(str(index), prompt_ids(loaded, question.question), is_right)

    asked = [ask(i, q) for i, q in enumerate(questions) for _ in range(config.samples)]
    cast(Any, torch).manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cast(Any, loaded.model).to(device).eval()
    if device == "cuda":
        cast_to(loaded.model, torch.bfloat16)
    return roll_out(
        asked,
        lambda requests: write(loaded, requests, config.batch_rows),
        loaded.dialect,
        max_cycles=config.max_cycles,
        max_tokens=config.max_cycles * config.max_cycle_tokens,
        max_cycle_tokens=config.max_cycle_tokens,
    )


def prompt_ids(loaded: Loaded, question: str) -> list[int]:
    """A question alone in the model's chat template, as the server renders it. Raises ConfigError without one."""
    tokenizer = cast(Any, loaded.tokenizer)
    if not tokenizer.chat_template:
        raise ConfigError("the policy's tokenizer has no chat template, so nothing says how it is asked; add one")
    messages = [{"role": "user", "content": question}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return loaded.dialect.encode(text)


@torch.inference_mode()
def write(loaded: Loaded, requests: Sequence[Request], batch_rows: int) -> list[Written]:
    """Continue every request at temperature 1, similar lengths together."""
    dialect, model = loaded.dialect, cast(Any, loaded.model)
    ends = sorted(dialect.end_of_turn_ids | dialect.cycle_end_ids)
    pad_id = cast(int, loaded.tokenizer.pad_token_id)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    written: dict[int, Written] = {}
    for start in tqdm(range(0, len(order), batch_rows), desc="sampling", unit="batch", leave=False):
        rows = order[start : start + batch_rows]
        prompts = [requests[i].prompt_ids for i in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[*[pad_id] * (width - len(p)), *p] for p in prompts], device=model.device)
        mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            max_new_tokens=max(requests[i].max_tokens for i in rows), eos_token_id=ends, pad_token_id=pad_id,
        )  # fmt: skip
        fresh = cast(list[list[int]], output[:, width:].tolist())
        for i, row in zip(rows, fresh, strict=True):
            written[i] = Written(_until(row, ends)[: requests[i].max_tokens], None)
    return [written[i] for i in range(len(requests))]


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end, which is kept."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def _check_contrast(rollouts: Sequence[Rollout], whose: str) -> None:
    labels = [c.is_right for c in labelled_cycles(rollouts)]
    if sum(labels) in (0, len(labels)):
        raise ConfigError(
            f"{sum(labels)} of {len(labels)} finished answers to the {whose} questions are right, so there is nothing "
            "to tell apart; take other questions, more of them, more samples or more max_cycle_tokens"
        )


# Training and judgement.


def _fresh(config: GeneratorConfig, *, pad_id: int) -> PreTrainedModel:
    """The policy's body (R-TAP app. A) under a fresh head of one label."""
    cast(Any, torch).manual_seed(config.seed)
    factory = cast(Any, AutoModelForSequenceClassification)
    try:
        model = factory.from_pretrained(config.policy, num_labels=1, dtype=torch.float32)
    except ValueError as error:
        raise ConfigError(f"transformers has no sequence classifier of {config.policy}'s kind: {error}") from error
    model.config.pad_token_id = pad_id  # else nothing tells where a padded row ends
    return cast(PreTrainedModel, model.to("cuda" if torch.cuda.is_available() else "cpu"))


def _train(generator: OnlineGenerator, cycles: Sequence[LabelledCycle], config: GeneratorConfig) -> list[float]:
    """Loss of every step."""
    by_question: dict[str, list[LabelledCycle]] = {}
    for cycle in cycles:
        by_question.setdefault(cycle.question, []).append(cycle)
    rng, curve = Random(config.seed), list[float]()
    names, size = list(by_question), config.questions_per_step
    for _ in range(config.epochs):
        rng.shuffle(names)
        for start in tqdm(range(0, len(names), size), desc="training", unit="step", leave=False):
            loss = generator.update([c for name in names[start : start + size] for c in by_question[name]])
            if loss is not None:
                curve.append(loss)
    return curve


def _score(generator: OnlineGenerator, rollouts: Sequence[Rollout]) -> Cycles:
    found = [(r, i, (*r.prompt_ids, *c.ids)) for r in rollouts for i, c in enumerate(r.cycles) if c.answer is not None]
    p = np.array(generator.score([ids for _, _, ids in found]), dtype=np.float64).clip(CERTAIN, 1 - CERTAIN)
    return Cycles(
        np.log(p / (1 - p)),
        np.array([r.cycles[i].is_right for r, i, _ in found], dtype=np.bool_),
        [int(r.question) for r, _, _ in found],
        np.array([i == 0 for _, i, _ in found], dtype=np.bool_),
    )


def _show(
    config: GeneratorConfig,
    curve: Sequence[float],
    judged: dict[str, Any],
    questions: Sequence[Question],
    rollouts: Sequence[Rollout],
    confidences: Floats,
) -> None:
    """The run in TensorBoard, as the other stages have it."""
    folder, rest = run_dir(config.output) / "tensorboard", iter(cast(list[float], confidences.tolist()))
    rows = [[None if c.answer is None else next(rest) for c in r.cycles] for r in rollouts]
    samples = [
        Sample(
            questions[int(r.question)].question, "".join(c.text for c in r.cycles), len(r.cycles),
            len(r.completion_ids), r.is_right, row[-1],
        )
        for r, row in zip(rollouts, rows, strict=True)
    ]  # fmt: skip
    tokens, count = sum(len(r.completion_ids) for r in rollouts), len(rollouts)
    oops = sum(c.oops_tokens for r in rollouts for c in r.cycles)
    scalars = {
        "held_out/first_right": sum(r.cycles[0].is_right for r in rollouts) / count,
        "held_out/right": sum(r.is_right for r in rollouts) / count,
        "held_out/cycles": sum(len(r.cycles) for r in rollouts) / count,
        "held_out/tokens": tokens / count,
        "held_out/oops_per_1000_tokens": 1000 * oops / max(1, tokens),
    }
    shown = ("within_auroc", "global_auroc", "ece", "brier")
    scalars |= {f"held_out/confidence/{name}": judged[name] for name in shown if judged[name] is not None}
    events = open_events(folder, resumed_at=0)
    for step, loss in enumerate(curve, start=1):
        events.add_scalar("train/loss", loss, step)
    events.close()
    add_events(folder, len(curve), scalars, {TAG: samples})
