"""Confidence generator for any Hugging Face model (``rtap train generator``).

The model's cycles, sampled on questions or kept in a file, are labelled by answer checkers. A classifier learns the
labels with the Trainer of transformers, is calibrated, and is evaluated on held-out questions.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]
from peft import get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from rtap_core.adapters import merge_adapter
from rtap_core.artifact import LOGPROB_WEIGHTS, NUM_BINS, Logistic
from rtap_core.classifier_input import answer_ids
from rtap_core.errors import ConfigError
from rtap_core.features import LogprobFeatures
from rtap_training.checkpoint import manifest
from rtap_training.config.generator import GeneratorConfig
from rtap_training.config.settings import run_dir
from rtap_training.data.equations import NO_LABEL, equation_labels
from rtap_training.data.examples import Example, synthetic_texts, unrelated_text
from rtap_training.data.questions import Question, load_questions, message
from rtap_training.data.trajectories import (
    SampledTrajectory,
    kept_trajectories,
    numbered,
    prompt_ids,
    remove_samples,
    sample_parts,
)
from rtap_training.evaluation.calibration import Bools, Floats, Seen, best_threshold, figures, fit_confidence, histogram
from rtap_training.evaluation.reliability import plot_png
from rtap_training.events import FOLDER, SHOWN, TAG, Sample, add_events, last_confidences, means_over
from rtap_training.models.huggingface import cast_to, save_checkpoint
from rtap_training.models.loading import load_dialect, lora_config
from rtap_training.models.online_generator import LabelledCycle, pad_rows, score_rows, train_in_fp32, weighted_examples
from rtap_training.models.output import save_generator_adapter
from rtap_training.rl.rollouts import Dialect, RolledCycle
from rtap_training.runtime import configure_torch, end_processes
from rtap_training.supervised import check_resumable, optimizer, run_trainer, trainer_arguments
from rtap_training.tasks import TASKS, parse_mix
from rtap_training.tasks.base import Split, sample_split
from rtap_training.tasks.jsonl import question_split

Item = TypeVar("Item")
Parts = tuple[list[Question], list[Question], list[Question]]  # of training, calibration, evaluation; disjoint
UNRELATED_SHARE = 0.1  # of the right workings of `corruptions`


@dataclass(frozen=True, slots=True)
class Cycles:
    """Generator's scores and labels of cycles with an answer, in trajectory order. logprobs: empty unless all cycles
    have them."""

    scores: list[float]
    labels: Bools
    questions: list[int]
    is_first: Bools
    logprobs: list[LogprobFeatures]

    @property
    def seen(self) -> list[Seen]:
        """(generator's score, log-probability features) of each cycle."""
        return list(zip(self.scores, self.logprobs or [None] * len(self.scores), strict=True))

    def confidences(self, logistic: Logistic) -> Floats:
        """Confidences as served."""
        return np.array([logistic.confidence(*one) for one in self.seen], dtype=np.float64)


def run(config: GeneratorConfig) -> None:
    """Sample, train, calibrate, evaluate on held-out questions, save, and print the metrics. Raises ConfigError.

    Resumes from the kept samples and the run's last complete checkpoint.
    """
    configure_torch(config.threads, config.seed)
    arguments = trainer_arguments(
        TrainingArguments, config, remove_unused_columns=False, train_sampling_strategy="group_by_length"
    )
    check_resumable(config)
    judge_tokenizer = load_dialect(config.backbone)[1] if config.backbone else None  # before hours of sampling
    processor, tokenizer, dialect = load_dialect(config.policy, config.template_kwargs)
    if processor is not tokenizer:
        raise ConfigError(
            f"{config.policy} is a vision-language model; `rtap train generator` supports text models only"
        )
    parts, sampled = _samples(config, dialect)
    added = _corruptions(config, dialect)
    if judge_tokenizer is not None:
        tokenizer = judge_tokenizer
        sampled = [
            _in_chat(turns, [message(q, config.prompt) for q in part], tokenizer, dialect)
            for turns, part in zip(sampled, parts, strict=True)
        ]
    held_out = parts[2]
    cycles = _labelled(sampled[0])
    _check_contrast([c.is_right for c in cycles], "training")
    _check_contrast([c.is_right for c in _labelled(sampled[1])], "validation")
    if not _labelled(sampled[2]):
        raise ConfigError("no held-out answer is finished; use more questions, or a larger max_cycle_tokens")
    examples = _weighted([*cycles, *added], config)
    pad_id = cast(int, tokenizer.pad_token_id)
    configure_torch(config.threads, config.seed)  # new weights depend on the seed alone, not on the sampling
    trainer = ClassifierTrainer(
        model=_fresh(config, pad_id=pad_id),
        args=arguments,
        train_dataset=_dataset(examples, tokenizer if config.equation_weight else None),
        data_collator=Padding(pad_id),
        equation_weight=config.equation_weight,
        optimizer_cls_and_kwargs=optimizer(config, arguments),
    )
    data = json.dumps([(e.ids, e.weight, e.is_right) for e in examples])
    trained = run_trainer(trainer, config, data=data)
    if not trainer.is_world_process_zero():
        end_processes(trainer.accelerator)
        return
    model = cast(PreTrainedModel, trainer.accelerator.unwrap_model(trainer.model))
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
    judged = _judged(unseen, confidences, held_out)
    calibration = {"bins": NUM_BINS, "reference": histogram(confidences[unseen.is_first]), "held_out": judged["all"]}
    model.config.rtap = {
        "format": dialect.format.name, "kind": "confidence", "threshold": threshold, "logistic": logistic.model_dump(),
        "calibration": calibration, "input": "chat" if config.backbone else "token_ids",
    }  # fmt: skip
    summary = trained.figures | {"examples": len(examples), "threshold": threshold, "held_out": judged}
    _show(config, int(trainer.state.global_step), judged["all"], held_out, sampled[2], confidences)
    _plot(run_dir(config.output) / "reliability.png", unseen, confidences, held_out)
    record = manifest("rtap train generator", config, data=data, seconds=trained.seconds, figures=summary)
    if adapter is not None and not config.merge:
        save_generator_adapter(config.output, adapter, model.config, record)
    else:
        cast_to(model, torch.bfloat16)
        save_checkpoint(config.output, model, tokenizer, record)
    remove_samples(config.output)
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    end_processes(trainer.accelerator)


# Samples.


def _samples(config: GeneratorConfig, dialect: Dialect) -> tuple[Parts, list[list[SampledTrajectory]]]:
    """Questions of each part, and their trajectories: of a samples file, or sampled from the policy."""
    if config.samples_file is not None:
        return _kept(config, config.samples_file, dialect)
    known = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    held_out = load_questions(config.questions, Split.HELD_OUT, seed=config.seed, count=config.eval_questions)
    parts = (*_divided(known, config), held_out)
    named = {"fitting": parts[0], "validation": parts[1], "held-out": held_out}
    return parts, sample_parts(config.policy, dialect, named, config, max_cycles=config.max_cycles)


def _divided(known: list[Item], config: GeneratorConfig) -> tuple[list[Item], list[Item]]:
    """(training, calibration) of the known questions."""
    kept = max(1, round(config.validation_share * len(known)))
    if kept >= len(known):
        source = config.questions or config.samples_file
        raise ConfigError(f"{source} has only {len(known)} training questions; add more")
    return known[kept:], known[:kept]


def _kept(config: GeneratorConfig, file: Path, dialect: Dialect) -> tuple[Parts, list[list[SampledTrajectory]]]:
    """The parts of a samples file, and their trajectories."""
    found = kept_trajectories(dialect, file)
    Random(config.seed).shuffle(found)
    known = [one for one in found if question_split(one[0].identity) is Split.TRAIN][: config.num_questions]
    held_out = [one for one in found if question_split(one[0].identity) is Split.HELD_OUT][: config.eval_questions]
    if not held_out:
        raise ConfigError(f"{file} has no held_out question; a tenth is held out by hash, so sample more")
    parts = (*_divided(known, config), held_out)
    fitting, validation, unseen = ([question for question, _ in part] for part in parts)
    return (fitting, validation, unseen), [numbered([rows for _, rows in part]) for part in parts]


def _corruptions(config: GeneratorConfig, dialect: Dialect) -> list[LabelledCycle]:
    """Right workings of bundled tasks, copies with a wrong step, and the right one under text that asks for nothing: a
    policy rarely samples such errors."""
    if not config.corruptions:
        return []
    if dialect.format.name != "rtap" or config.backbone or not config.questions:
        raise ConfigError(f"corruptions={config.corruptions} need bundled tasks as questions, format rtap, no backbone")
    rng, shares = Random(f"{config.seed}:corruptions"), parse_mix(config.questions)
    cycles: list[LabelledCycle] = []
    for number in range(config.corruptions):
        name = rng.choices(list(shares), list(shares.values()))[0]
        problem = sample_split(TASKS[name], rng, Split.TRAIN)
        prompt = prompt_ids(dialect, problem.phrase(rng))
        for text, is_right in synthetic_texts(problem, rng):
            cycles.append(LabelledCycle(f"corrupted {number}", (*prompt, *dialect.encode(text)), is_right))
            if is_right and rng.random() < UNRELATED_SHARE:
                other = prompt_ids(dialect, unrelated_text(rng))
                cycles.append(LabelledCycle(f"corrupted {number}", (*other, *dialect.encode(text)), False))
    return cycles


def _in_chat(
    turns: Sequence[SampledTrajectory], messages: Sequence[str], tokenizer: Any, dialect: Dialect
) -> list[SampledTrajectory]:
    """The trajectories with each cycle as a chat in the backbone's tokens, as the server's chat input renders it."""

    def read(turn: SampledTrajectory, cycle: RolledCycle) -> RolledCycle:
        text = dialect.decode(cycle.ids)
        return replace(cycle, ids=answer_ids(tokenizer, messages[turn.question], text, tokenizer.pad_token_id))

    return [replace(turn, prompt_ids=(), cycles=tuple(read(turn, cycle) for cycle in turn.cycles)) for turn in turns]


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
    shape = classifier_shape(name, config.num_layers)
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


def classifier_shape(name: str, num_layers: int) -> Any:
    """Config of a model as a classifier with one label and its first ``num_layers`` layers; 0: all.

    Raises ConfigError if it has fewer."""
    shape: Any = AutoConfig.from_pretrained(name, num_labels=1)
    if num_layers:
        body = shape.get_text_config()
        if num_layers > body.num_hidden_layers:
            raise ConfigError(f"num_layers={num_layers} is above the {body.num_hidden_layers} of {name}")
        body.num_hidden_layers = num_layers
        if getattr(body, "layer_types", None):
            body.layer_types = body.layer_types[:num_layers]
    return shape


def _weighted(cycles: Sequence[LabelledCycle], config: GeneratorConfig) -> list[Example]:
    """Distinct cycles, weighted as in R-TAP eq. 6 with a mean of 1. Raises ConfigError if none has weight."""
    weighted = weighted_examples(cycles, global_weight=config.global_weight)
    if not weighted:
        raise ConfigError("no question has right and wrong answers; use more samples, or a global_weight above 0")
    mean = sum(e.weight for e in weighted) / len(weighted)
    return [replace(e, weight=e.weight / mean) for e in weighted]


def _dataset(examples: Sequence[Example], tokenizer: Any) -> Any:
    """Rows of the Trainer. tokenizer: to find written equations; None: without them."""
    columns: dict[str, list[Any]] = {
        "input_ids": [list(e.ids) for e in examples],
        "is_right": [float(e.is_right) for e in examples],
        "weight": [e.weight for e in examples],
    }
    if tokenizer is not None:
        columns["equations"] = [equation_labels(tokenizer.convert_ids_to_tokens(ids)) for ids in columns["input_ids"]]
    return Dataset.from_dict(columns)


@dataclass(frozen=True, slots=True)
class Padding:
    """Collate examples: right-padded ids (B, T), their mask, labels (B,), weights (B,), and labels (B, T) of equations
    if the examples have them."""

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_id)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "is_right": torch.tensor([row["is_right"] for row in rows]),
            "weight": torch.tensor([row["weight"] for row in rows]),
        }
        if "equations" in rows[0]:
            batch["equations"], _ = pad_rows([row["equations"] for row in rows], NO_LABEL)
        return batch


class ClassifierTrainer(Trainer):
    """Trainer of the balanced cross-entropy (R-TAP eq. 6): each cycle counts by its weight.

    equation_weight: weight of a cycle's written equations, whose last tokens the same head reads, next to its 1.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the micro batch

    def __init__(self, *, equation_weight: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._equation_weight = equation_weight

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted mean over the rows."""
        del num_items_in_batch  # of tokens
        labels, weights, equations = inputs.pop("is_right"), inputs.pop("weight"), inputs.pop("equations", None)
        outputs = model(**inputs, output_hidden_states=equations is not None)
        losses = F.binary_cross_entropy_with_logits(outputs.logits[:, 0].float(), labels, reduction="none")
        if equations is not None:
            logits = self.accelerator.unwrap_model(model).score(outputs.hidden_states[-1])[..., 0].float()
            losses = losses + self._equation_weight * equation_losses(logits, equations)
        loss = (losses * weights).mean()
        return (loss, outputs) if return_outputs else loss


def equation_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each row's labelled tokens (B,); 0 for a row without. logits, labels: (B, T)."""
    is_labelled = labels != NO_LABEL
    losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
    return (losses * is_labelled).sum(1) / is_labelled.sum(1).clamp(min=1)


def _merged_as_saved(adapter: Any, config: GeneratorConfig) -> PreTrainedModel:
    """The classifier that a server makes of the saved adapter: in fp32, with the adapter in its weights."""
    with TemporaryDirectory() as name:
        save_generator_adapter(folder := Path(name) / "adapter", adapter, adapter.config, {})
        return merge_adapter(folder, config.backbone or config.policy).to(adapter.device)


def _score(model: PreTrainedModel, turns: Sequence[SampledTrajectory], *, bf16: bool) -> Cycles:
    found = [(t, i, (*t.prompt_ids, *c.ids)) for t in turns for i, c in enumerate(t.cycles) if c.answer is not None]
    logprobs = [known for t, i, _ in found if (known := t.cycles[i].logprobs) is not None]
    return Cycles(
        score_rows(model, [ids for _, _, ids in found], bf16=bf16),
        np.array([t.cycles[i].is_right for t, i, _ in found], dtype=np.bool_),
        [t.question for t, _, _ in found],
        np.array([i == 0 for _, i, _ in found], dtype=np.bool_),
        logprobs if len(logprobs) == len(found) else [],
    )


def _by_task(unseen: Cycles, questions: Sequence[Question]) -> dict[str, Bools]:
    """Which cycles are of ``all`` tasks, and of each if there are several."""
    tasks = np.array([questions[q].task for q in unseen.questions])
    names = sorted(set(tasks.tolist()))
    own: dict[str, Bools] = {name: tasks == name for name in names} if len(names) > 1 else {}
    return own | {"all": np.ones(len(tasks), dtype=np.bool_)}


def _judged(unseen: Cycles, confidences: Floats, questions: Sequence[Question]) -> dict[str, Any]:
    """Metrics of held-out cycles by task.

    alone: within-question AUROC of the classifier's own score; first_alone: of first cycles."""
    scores, asked = np.array(unseen.scores), np.array(unseen.questions)

    def alone(part: Bools) -> float | None:
        if not part.any():
            return None
        return figures(scores[part], unseen.labels[part], asked[part].tolist()).within_auroc

    return {
        name: asdict(figures(confidences[part], unseen.labels[part], asked[part].tolist()))
        | {"alone": alone(part), "first_alone": alone(part & unseen.is_first)}
        for name, part in _by_task(unseen, questions).items()
    }


def _plot(file: Path, unseen: Cycles, confidences: Floats, questions: Sequence[Question]) -> None:
    """Write the reliability plot of the held-out cycles by task."""
    parts = _by_task(unseen, questions)
    curves = {name: (confidences[part], unseen.labels[part]) for name, part in parts.items()}
    file.write_bytes(plot_png(curves, "held-out questions, all cycles"))


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
