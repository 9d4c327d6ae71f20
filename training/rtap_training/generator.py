"""Confidence generator for any Hugging Face model (``rtap train generator``).

Sample the model on the user's questions, label the cycles with answer checkers, train, calibrate, evaluate. A killed
run resumes. ``bundled/confidence.py`` trains the demo's, with synthetic cycles in addition.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rtap_core.adapters import merge_adapter
from rtap_core.artifact import LOGPROB_WEIGHTS, NUM_BINS, Logistic
from rtap_core.classifier_input import answer_ids
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.calibration import Bools, Floats, Seen, best_threshold, figures, fit_confidence, histogram
from rtap_training.checkpoint import manifest, sha256
from rtap_training.config import run_dir
from rtap_training.events import FOLDER, SHOWN, TAG, Sample, add_events, last_confidences, means_over
from rtap_training.generator_config import GeneratorConfig
from rtap_training.generator_samples import SampledTrajectory, clean_up, kept_trajectories, numbered, sample
from rtap_training.huggingface import cast_to, save_checkpoint
from rtap_training.optim import Budget
from rtap_training.output import save_generator_adapter
from rtap_training.progress import Progress
from rtap_training.questions import Question, load_questions, message
from rtap_training.rl.loading import load_dialect, load_for_training, lora_config
from rtap_training.rl.online_generator import LabelledCycle, OnlineGenerator, score_rows, train_in_fp32
from rtap_training.rl.rollouts import Dialect, RolledCycle
from rtap_training.run_state import States, check_resumable, plain
from rtap_training.runtime import configure_torch
from rtap_training.tasks.base import Split
from rtap_training.tasks.jsonl import question_split
from rtap_training.training_errors import TrainingError

Item = TypeVar("Item")
Parts = tuple[list[Question], list[Question], list[Question]]  # of training, calibration, evaluation; disjoint


@dataclass(frozen=True, slots=True)
class Cycles:
    """Generator's scores and labels of cycles, in trajectory order. logprobs: empty unless all cycles have them."""

    scores: list[float]
    labels: Bools
    questions: list[int]
    is_first: Bools
    logprobs: list[LogprobFeatures]

    @property
    def seen(self) -> list[Seen]:
        """What the served confidence of each cycle is made of."""
        return list(zip(self.scores, self.logprobs or [None] * len(self.scores), strict=True))

    def confidences(self, logistic: Logistic) -> Floats:
        """Confidences as served."""
        return np.array([logistic.confidence(*one) for one in self.seen], dtype=np.float64)


def run(config: GeneratorConfig) -> None:
    """Sample, train, calibrate, evaluate on held-out questions, save, and print the metrics. Raises ConfigError.

    Resumes from saved samples and the last state.
    """
    check_resumable(config.output, config)
    configure_torch(config.threads, config.seed)
    judge_tokenizer = load_dialect(config.backbone)[1] if config.backbone else None  # before hours of sampling
    parts = None if config.samples_file else _questions(config)
    processor, tokenizer, dialect = load_dialect(config.policy)
    if processor is not tokenizer:
        raise ConfigError(
            f"{config.policy} is a vision-language model; `rtap train generator` supports text models only"
        )
    parts, sampled = _kept(config, tokenizer, dialect) if parts is None else (parts, _sampled(config, parts))
    if judge_tokenizer is not None:
        tokenizer = judge_tokenizer
        sampled = [
            _in_chat(turns, [message(q, config.prompt) for q in part], tokenizer, dialect)
            for turns, part in zip(sampled, parts, strict=True)
        ]
    fitting, validation, held_out = parts
    cycles = _labelled(sampled[0])
    _check_contrast([c.is_right for c in cycles], "training")
    _check_contrast([c.is_right for c in _labelled(sampled[1])], "validation")
    if not _labelled(sampled[2]):
        raise ConfigError("no held-out answer is finished; use more questions, or a larger max_cycle_tokens")
    states = States(run_dir(config.output), plain(config), data_sha256=sha256(json.dumps(cycles)))
    model = _fresh(config, pad_id=cast(int, tokenizer.pad_token_id))
    generator = OnlineGenerator(
        model, learning_rate=config.learning_rate, iterations=1, global_weight=config.global_weight, average=_alone,
        bf16=config.bf16,
    )  # fmt: skip
    training = _train(generator, _batches(cycles, config), config, states)
    adapter = model if config.lora_rank else None
    if adapter is not None:
        model = _merged_as_saved(adapter, config)
    cast_to(model, torch.bfloat16)  # evaluate the weights as they are saved
    cast_to(model, torch.float32)
    known, unseen = (_score(model, part, bf16=config.bf16) for part in sampled[1:])
    names = ("generator", *(LOGPROB_WEIGHTS if known.logprobs and unseen.logprobs else ()))
    logistic = fit_confidence(known.seen, known.labels, names)
    threshold = best_threshold(known.confidences(logistic), known.labels)
    confidences = unseen.confidences(logistic)
    judged = asdict(figures(confidences, unseen.labels, unseen.questions))
    alone = figures(np.array(unseen.scores), unseen.labels, unseen.questions).within_auroc
    calibration = {"bins": NUM_BINS, "reference": histogram(confidences[unseen.is_first]), "held_out": judged}
    model.config.rtap = {
        "format": dialect.format.name, "kind": "confidence", "threshold": threshold, "logistic": logistic.model_dump(),
        "calibration": calibration, "input": "chat" if config.backbone else "token_ids",
    }  # fmt: skip
    summary = training | {"threshold": threshold, "held_out": judged, "within_auroc_without_logprobs": alone}
    _show(config, training["steps"], judged, held_out, sampled[2], confidences)
    data = "\n".join(q.identity for q in (*fitting, *validation))
    record = manifest("rtap train generator", config, data=data, seconds=training["seconds"], figures=summary)
    if adapter is not None and not config.merge:
        save_generator_adapter(config.output, adapter, model.config, record)
    else:
        cast_to(model, torch.bfloat16)
        save_checkpoint(config.output, model, tokenizer, record)
    clean_up(states)
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")


def _alone(_: Sequence[Tensor]) -> None:
    """Mean over a single process."""


def _questions(config: GeneratorConfig) -> Parts:
    """Questions of each part, drawn from ``config.questions``."""
    known = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    held_out = load_questions(config.questions, Split.HELD_OUT, seed=config.seed, count=config.eval_questions)
    return (*_divided(known, config), held_out)


def _divided(known: list[Item], config: GeneratorConfig) -> tuple[list[Item], list[Item]]:
    """(training, calibration) of the known questions."""
    kept = max(1, round(config.validation_share * len(known)))
    if kept >= len(known):
        source = config.questions or config.samples_file
        raise ConfigError(f"{source} has only {len(known)} training questions; add more")
    return known[kept:], known[:kept]


def _sampled(config: GeneratorConfig, parts: Parts) -> list[list[SampledTrajectory]]:
    """Trajectories of each part, sampled with transformers."""
    loaded = load_for_training(config.policy)
    names = ("fitting", "validation", "held-out")
    return [
        sample(loaded, part, config, name, config.seed + i)
        for i, (name, part) in enumerate(zip(names, parts, strict=True))
    ]


def _kept(
    config: GeneratorConfig, tokenizer: PreTrainedTokenizerBase, dialect: Dialect
) -> tuple[Parts, list[list[SampledTrajectory]]]:
    """The parts of a samples file, and their trajectories."""
    assert config.samples_file is not None
    found = kept_trajectories(tokenizer, dialect, config.samples_file)
    Random(config.seed).shuffle(found)
    known = [one for one in found if question_split(one[0].identity) is Split.TRAIN][: config.num_questions]
    held_out = [one for one in found if question_split(one[0].identity) is Split.HELD_OUT][: config.eval_questions]
    if not held_out:
        raise ConfigError(
            f"{config.samples_file} has no held_out question; a tenth is held out by hash, so sample more"
        )
    parts = (*_divided(known, config), held_out)
    fitting, validation, unseen = ([question for question, _ in part] for part in parts)
    return (fitting, validation, unseen), [numbered([rows for _, rows in part]) for part in parts]


def _in_chat(
    turns: Sequence[SampledTrajectory], messages: Sequence[str], tokenizer: Any, dialect: Dialect
) -> list[SampledTrajectory]:
    """The trajectories with each cycle as a chat in the backbone's tokens, as the server's chat input renders it."""

    def read(turn: SampledTrajectory, cycle: RolledCycle) -> RolledCycle:
        text = dialect.decode(cycle.ids)
        return replace(cycle, ids=answer_ids(tokenizer, messages[turn.question], text, tokenizer.pad_token_id))

    return [replace(turn, prompt_ids=(), cycles=tuple(read(turn, cycle) for cycle in turn.cycles)) for turn in turns]


# Samples.


def _labelled(turns: Sequence[SampledTrajectory]) -> list[LabelledCycle]:
    """Cycles with an answer; truncated ones are left out."""
    return [
        LabelledCycle(str(t.question), (*t.prompt_ids, *c.ids), c.is_right)
        for t in turns
        for c in t.cycles
        if c.answer is not None
    ]


def _check_contrast(labels: Sequence[bool], whose: str) -> None:
    if sum(labels) in (0, len(labels)):
        raise ConfigError(
            f"{sum(labels)} of {len(labels)} finished answers to the {whose} questions are right, so there is "
            "no contrast to learn from; use other or more questions, more samples, or a larger max_cycle_tokens"
        )


# Training and judgement.


def _fresh(config: GeneratorConfig, *, pad_id: int) -> PreTrainedModel:
    """The backbone's body (R-TAP app. A: the policy's) with a new one-label head."""
    torch.manual_seed(config.seed)
    name = config.backbone or config.policy
    shape: Any = AutoConfig.from_pretrained(name, num_labels=1)
    if config.num_layers:
        body = shape.get_text_config()
        if config.num_layers > body.num_hidden_layers:
            raise ConfigError(f"num_layers={config.num_layers} is above the {body.num_hidden_layers} of {name}")
        body.num_hidden_layers = config.num_layers
        if getattr(body, "layer_types", None):
            body.layer_types = body.layer_types[: config.num_layers]
    factory = AutoModelForSequenceClassification
    try:
        dtype = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32
        model = factory.from_pretrained(name, config=shape, dtype=dtype)
    except ValueError as error:
        raise ConfigError(f"transformers has no sequence classifier for the architecture of {name}: {error}") from error
    model.config.pad_token_id = pad_id  # needed to find the end of a padded row
    if config.lora_rank:
        model = get_peft_model(model, lora_config(config.lora_rank, "SEQ_CLS"))
        train_in_fp32(model)
    return cast(PreTrainedModel, model.to("cuda" if torch.cuda.is_available() else "cpu"))


def _batches(cycles: Sequence[LabelledCycle], config: GeneratorConfig) -> list[list[LabelledCycle]]:
    """Batches of all epochs; each holds all cycles of some questions. Raises ConfigError if no question can be used."""
    by_question: dict[str, list[LabelledCycle]] = {}
    for cycle in cycles:
        by_question.setdefault(cycle.question, []).append(cycle)
    names = [n for n, own in by_question.items() if config.global_weight or len({c.is_right for c in own}) == 2]
    if not names:
        raise ConfigError("no question has right and wrong answers; use more samples, or a global_weight above 0")
    rng, size = Random(config.seed), config.questions_per_step
    batches: list[list[LabelledCycle]] = []
    for _ in range(config.epochs):
        rng.shuffle(names)
        batches += ([c for name in names[k : k + size] for c in by_question[name]] for k in range(0, len(names), size))
    return batches


def _train(
    generator: OnlineGenerator, batches: Sequence[list[LabelledCycle]], config: GeneratorConfig, states: States
) -> dict[str, Any]:
    """Run the steps after the last state. Raises TrainingError when the loss is not finite."""
    last = states.last
    shared, own = states.load(last) if last is not None else ({}, {})
    budget = Budget(0.0, len(batches), used=shared.get("seconds", 0.0), steps=shared.get("steps", 0))
    progress, saved = Progress("generator", states.folder, budget), monotonic()
    if last is not None:
        generator.load_state_dict(shared["generator"])
        progress.load_state_dict(shared["progress"])
        torch.set_rng_state(own["torch"])
    with progress:
        for batch in batches[budget.steps :]:
            loss = generator.update(batch)
            if loss is None or not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {budget.steps + 1}; {states.resume_hint}. Try a lower "
                    f"learning_rate, with another output or with {states.folder} removed"
                )
            budget.steps += 1
            progress.record(loss, rows=len(batch), tokens=sum(len(c.ids) for c in batch))
            is_step = config.save_steps > 0 and budget.steps % config.save_steps == 0
            is_time = monotonic() - saved > config.save_minutes * 60
            if is_step or is_time or budget.steps == len(batches):
                state = {"generator": generator.state_dict(), "progress": progress.state_dict()}
                steps = {"steps": budget.steps, "seconds": budget.seconds}
                states.save(budget.steps, state | steps, {"torch": torch.get_rng_state()})
                saved = monotonic()
    return progress.summary()


def _merged_as_saved(adapter: Any, config: GeneratorConfig) -> PreTrainedModel:
    """The classifier that a server makes of the saved adapter: in fp32, with the adapter in its weights."""
    with TemporaryDirectory() as name:
        save_generator_adapter(folder := Path(name) / "adapter", adapter, adapter.config, {})
        return merge_adapter(folder, config.backbone or config.policy).to(adapter.device)


def _score(model: PreTrainedModel, turns: Sequence[SampledTrajectory], *, bf16: bool) -> Cycles:
    found = [(t, i, (*t.prompt_ids, *c.ids)) for t in turns for i, c in enumerate(t.cycles) if c.answer is not None]
    logprobs = [t.logprobs for t, _, _ in found if t.logprobs is not None]
    return Cycles(
        score_rows(model, [ids for _, _, ids in found], bf16=bf16),
        np.array([t.cycles[i].is_right for t, i, _ in found], dtype=np.bool_),
        [t.question for t, _, _ in found],
        np.array([i == 0 for _, i, _ in found], dtype=np.bool_),
        logprobs if len(logprobs) == len(found) else [],
    )


def _show(
    config: GeneratorConfig,
    step: int,
    judged: dict[str, Any],
    questions: Sequence[Question],
    turns: Sequence[SampledTrajectory],
    confidences: Floats,
) -> None:
    """Write metrics and sample trajectories to TensorBoard."""
    last = last_confidences(turns, confidences.tolist())
    samples = [
        Sample(
            questions[t.question].question, "".join(c.text for c in t.cycles), len(t.cycles), t.tokens, t.is_right, p
        )
        for t, p in zip(turns, last, strict=True)
    ]  # fmt: skip
    tokens, oops = sum(t.tokens for t in turns), sum(c.oops_tokens for t in turns for c in t.cycles)
    scalars = {f"held_out/{name}": value for name, value in means_over(turns, tokens=tokens, oops=oops).items()}
    scalars |= {f"held_out/confidence/{name}": judged[name] for name in SHOWN if judged[name] is not None}
    add_events(run_dir(config.output) / FOLDER, step, scalars, {TAG: samples})
