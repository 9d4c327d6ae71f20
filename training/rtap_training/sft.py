"""Supervised training of any Hugging Face model with TRL's SFTTrainer (``rtap train sft``).

The rows are conversations of a file, or are made of kept samples: right ones, or corrections, in which a cycle of the
policy is followed by a right one. Only the last message or cycle of a row is trained.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import manifest
from rtap_training.config.sft import CORRECTIONS, RIGHT, SftConfig
from rtap_training.data.questions import load_questions
from rtap_training.data.trajectories import SampledTrajectory, kept_trajectories, remove_samples, sample_parts
from rtap_training.models.loading import load_dialect, load_for_training, lora_config
from rtap_training.models.output import save_policy
from rtap_training.models.teacher import check_same_tokens
from rtap_training.rl.rollouts import Dialect
from rtap_training.runtime import configure_torch, end_processes
from rtap_training.supervised import check_resumable, optimizer, run_trainer, trainer_arguments
from rtap_training.tasks.base import Split
from rtap_training.tasks.jsonl import question_split

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids. The loss is on those after ``num_context``."""

    ids: tuple[int, ...]
    num_context: int


def run(config: SftConfig) -> None:
    """Train and write ``config.output``. Resumes from the run's last complete checkpoint. Raises ConfigError."""
    configure_torch(config.threads, config.seed)
    arguments = trainer_arguments(TrlConfig, config, max_length=config.max_length)
    check_resumable(config)
    dtype = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32
    loaded = load_for_training(config.policy, config.template_kwargs, dtype=dtype)
    if loaded.sees_images:
        raise ConfigError(f"{config.policy} is a vision-language model; `rtap train sft` supports text models only")
    rows, counts = build_rows(config, loaded.tokenizer, loaded.dialect)
    trainer = SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=_dataset(rows),
        processing_class=loaded.processor,
        peft_config=lora_config(config.lora_rank) if config.lora_rank else None,
        optimizer_cls_and_kwargs=optimizer(config, arguments),
    )
    data = json.dumps([(row.ids, row.num_context) for row in rows])
    trained = run_trainer(trainer, config, data=data)
    if trainer.is_world_process_zero():
        figures = {"rows": counts} | trained.figures
        record = manifest("rtap train sft", config, data=data, seconds=trained.seconds, figures=figures)
        save_policy(
            config.output,
            trainer.model,
            trained.weights,
            loaded,
            record,
            merge_into=config.policy if config.merge else None,
            continues=config.data == CORRECTIONS,
        )
        remove_samples(config.output)
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    end_processes(trainer.accelerator)


def build_rows(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, dialect: Dialect
) -> tuple[list[Row], dict[str, int]]:
    """(rows, number of each kind and of those left out as too long). Samples of the tenth of questions that is held out
    by hash are not used. Raises ConfigError if there is no row."""
    if config.data not in (RIGHT, CORRECTIONS):
        parts = {"lines": _read_rows(Path(config.data), dialect)}
    else:
        samples = _samples(config, tokenizer, dialect)
        rng = Random(config.seed)
        if config.data == RIGHT:
            parts = {RIGHT: [row for of_one in samples for row in _build_right_rows(of_one, dialect, config, rng)]}
        else:
            parts = build_corrections(samples, dialect, config, rng)
    fitting = {name: [row for row in part if len(row.ids) <= config.max_length] for name, part in parts.items()}
    too_long = sum(len(part) - len(fitting[name]) for name, part in parts.items())
    if config.data == CORRECTIONS:
        rng = Random(f"{config.seed}:shares")
        for name, share in (("confirmed", config.confirmed_share), ("kept", config.kept_share)):
            count = min(len(fitting[name]), round(share * len(fitting["corrected"])))
            fitting[name] = rng.sample(fitting[name], count)
    rows = [row for part in fitting.values() for row in part]
    if not rows:
        source = config.samples_file or config.data
        raise ConfigError(
            f"{source} gives no row of at most max_length={config.max_length} tokens to train on; `{RIGHT}` needs "
            f"right samples, `{CORRECTIONS}` questions with right and wrong ones"
        )
    return rows, {name: len(part) for name, part in fitting.items()} | {"too_long": too_long}


def _samples(config: SftConfig, tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> list[list[SampledTrajectory]]:
    """Samples of each training question: of a file, or sampled from the teacher or the policy."""
    if config.samples_file is not None:
        kept = kept_trajectories(dialect, config.samples_file)
        return [rows for question, rows in kept if question_split(question.identity) is Split.TRAIN]
    if config.teacher:
        check_same_tokens(tokenizer, load_dialect(config.teacher)[1], config.template_kwargs)
    questions = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    parts = {"train": questions}
    (turns,) = sample_parts(config.teacher or config.policy, dialect, parts, config, max_cycles=1)
    return [list(of_one) for _, of_one in groupby(turns, key=lambda turn: turn.question)]


def build_corrections(
    samples: Sequence[Sequence[SampledTrajectory]], dialect: Dialect, config: SftConfig, rng: Random
) -> dict[str, list[Row]]:
    """Rows of the samples of each question by kind, at most ``rows_per_question`` of each.

    corrected: a right cycle after a wrong one; the policy learns to open it. confirmed: a right cycle after another
    right one; the opening is not trained, because only a server opens it. kept: a right cycle as the first."""
    rows: dict[str, list[Row]] = {"corrected": [], "confirmed": [], "kept": []}
    opening = dialect.encode(dialect.format.cycle_open)
    for of_one in samples:
        finished = [sample for sample in of_one if sample.cycles[0].answer is not None]
        right, wrong = ([sample for sample in finished if sample.is_right is side] for side in (True, False))
        rows["kept"] += _build_right_rows(right, dialect, config, rng)
        for kind, firsts in (("corrected", wrong), ("confirmed", right)):
            for first in rng.sample(firsts, min(len(firsts), config.rows_per_question)):
                others = [sample for sample in right if sample is not first]
                if others:
                    before = (*first.prompt_ids, *first.cycles[0].ids)
                    after = (*opening, *_encode_after_opening(rng.choice(others), dialect))
                    rows[kind].append(Row((*before, *after), len(before) + (kind == "confirmed") * len(opening)))
    return rows


def _encode_after_opening(sample: SampledTrajectory, dialect: Dialect) -> tuple[int, ...]:
    """A sampled cycle as it follows an opening: without the tag that the opening has, and with the end of the turn."""
    text, fmt = sample.cycles[0].text, dialect.format
    if fmt.think_open and fmt.cycle_open.endswith(fmt.think_open):
        text = text.removeprefix(fmt.think_open)
    return (*dialect.encode(text), dialect.end_of_turn_id)


def _build_right_rows(
    samples: Sequence[SampledTrajectory], dialect: Dialect, config: SftConfig, rng: Random
) -> list[Row]:
    right = [sample for sample in samples if sample.is_right]
    drawn = rng.sample(right, min(len(right), config.rows_per_question))
    return [Row((*one.prompt_ids, *one.cycles[0].ids, dialect.end_of_turn_id), len(one.prompt_ids)) for one in drawn]


def _read_rows(path: Path, dialect: Dialect) -> list[Row]:
    """A row of each line of a JSONL file. Raises ConfigError that names the line."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            is_pair = "messages" not in content
            rows.append(_encode_pair(content, dialect) if is_pair else _encode_messages(content, dialect))
        except Exception as error:  # a template raises its own classes
            raise ConfigError(
                f'{path}:{number}: not a row ({type(error).__name__}: {error}); a line is {{"messages": [{{"role": …, '
                '"content": …}, …]}, the last one of the assistant, or {"prompt": text, "completion": text}'
            ) from error
    return rows


def _encode_messages(content: Any, dialect: Dialect) -> Row:
    *before, last = content["messages"]
    if last["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if unread := sorted({key for one in (*before, last) for key in one} - {"role", "content"}):
        raise ValueError(f"{', '.join(unread)} would not be read: put all text into content")
    prompt = dialect.render(before)
    text, tag = last["content"], dialect.format.think_open
    if tag and prompt.rstrip().endswith(tag):  # the template opens the thought
        text = text.lstrip().removeprefix(tag)
    context = dialect.encode(prompt)
    return Row((*context, *dialect.encode(text), dialect.end_of_turn_id), len(context))


def _encode_pair(content: Any, dialect: Dialect) -> Row:
    """Texts as they are: no template is applied, and the end of the turn is added only if it is missing."""
    prompt, completion = content["prompt"], content["completion"]
    if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion):
        raise ValueError(f"prompt={prompt!r} and completion={completion!r} must be texts that are not empty")
    context, ids = dialect.encode(prompt), dialect.encode(completion)
    end = () if ids[-1] == dialect.end_of_turn_id else (dialect.end_of_turn_id,)
    return Row((*context, *ids, *end), len(context))


def _dataset(rows: Sequence[Row]) -> Any:
    labels = [[*[IGNORED] * row.num_context, *row.ids[row.num_context :]] for row in rows]
    return Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})
