"""Supervised training of any Hugging Face model with TRL's SFTTrainer (``rtap train sft``).

The rows are conversations of a file, or are made of kept samples: right ones, or corrections, in which a cycle of the
policy is followed by a right one. Only the last message or cycle of a row is trained.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, cast

import torch
from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import manifest
from rtap_training.config import run_dir
from rtap_training.events import FOLDER
from rtap_training.generator_samples import SampledTrajectory, kept_trajectories
from rtap_training.policy_output import save_policy
from rtap_training.rl.checkpoints import JsonLog, last_checkpoint
from rtap_training.rl.loading import load_for_training, lora_config
from rtap_training.rl.rollouts import Dialect
from rtap_training.run_state import check_same_settings, describe, mark_complete, plain, step_of
from rtap_training.runtime import configure_torch
from rtap_training.sft_config import CORRECTIONS, RIGHT, SftConfig

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids. The loss is on those after ``num_context``."""

    ids: tuple[int, ...]
    num_context: int


@dataclass(frozen=True, slots=True)
class Corrections:
    """Rows by kind. corrected: a right cycle after a wrong one. confirmed: after a right one. kept: as the first."""

    corrected: list[Row]
    confirmed: list[Row]
    kept: list[Row]


def run(config: SftConfig) -> None:
    """Train and write ``config.output``. Resumes from the run's last complete checkpoint. Raises ConfigError."""
    configure_torch(config.threads, config.seed)
    checkpoint = last_checkpoint(run_dir(config.output))
    if checkpoint is not None:
        now = plain(config)
        check_same_settings(checkpoint, now, [name for name in now if name not in config.MAY_CHANGE])
    dtype = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32
    loaded = load_for_training(config.policy, dtype=dtype)
    if loaded.sees_images:
        raise ConfigError(f"{config.policy} is a vision-language model; `rtap train sft` supports text models only")
    rows, counts = rows_of(config, loaded.tokenizer, loaded.dialect)
    trainer = SFTTrainer(
        model=loaded.model,
        args=trl_arguments(config),
        train_dataset=_dataset(rows),
        processing_class=loaded.processor,
        peft_config=lora_config(config.lora_rank) if config.lora_rank else None,
    )
    log = JsonLog(
        run_dir(config.output) / "train.jsonl",
        resumed_at=step_of(checkpoint) if checkpoint else 0,
        is_writer=trainer.is_world_process_zero(),
    )
    trainer.add_callback(log)
    trainer.add_callback(_Complete(describe(plain(config))))
    started = monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # collective call
    if trainer.is_world_process_zero():
        data = json.dumps([row.ids for row in rows])
        figures = {"rows": counts} | log.last
        record = manifest("rtap train sft", config, data=data, seconds=monotonic() - started, figures=figures)
        save_policy(
            config.output,
            trainer.model,
            weights,
            loaded,
            record,
            merge_into=config.policy if config.merge else None,
            continues=config.data == CORRECTIONS,
        )
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.end_training()  # wait for the process that saves


def rows_of(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, dialect: Dialect
) -> tuple[list[Row], dict[str, int]]:
    """(rows, number of each kind). Raises ConfigError if there is none."""
    if config.samples_file is None:
        parts = {"conversations": _conversations(Path(config.data), tokenizer, dialect)}
    else:
        samples = [rows for _, rows in kept_trajectories(tokenizer, dialect, config.samples_file)]
        rng = Random(config.seed)
        if config.data == RIGHT:
            parts = {RIGHT: [row for turns in samples for row in _right_rows(turns, dialect, config, rng)]}
        else:
            parts = _drawn(corrections(samples, dialect, config, rng), config, rng)
    fitting = {name: [row for row in part if len(row.ids) <= config.max_length] for name, part in parts.items()}
    rows = [row for part in fitting.values() for row in part]
    if not rows:
        source = config.samples_file or config.data
        raise ConfigError(
            f"{source} gives no row of at most max_length={config.max_length} tokens to train on; `{RIGHT}` needs "
            f"right samples, `{CORRECTIONS}` questions with right and wrong ones"
        )
    return rows, {name: len(part) for name, part in fitting.items()}


def corrections(
    samples: Sequence[Sequence[SampledTrajectory]], dialect: Dialect, config: SftConfig, rng: Random
) -> Corrections:
    """Rows of the samples of each question, at most ``rows_per_question`` of each kind."""
    found = Corrections([], [], [])
    opening = dialect.encode(dialect.format.cycle_open)
    for turns in samples:
        finished = [turn for turn in turns if turn.cycles[0].answer is not None]
        right, wrong = ([turn for turn in finished if turn.is_right is side] for side in (True, False))
        if not right:
            continue
        found.kept.extend(_right_rows(right, dialect, config, rng))
        for part, firsts in ((found.corrected, wrong), (found.confirmed, right)):
            for first in rng.sample(firsts, min(len(firsts), config.rows_per_question)):
                second = rng.choice([turn for turn in right if turn is not first] or right)
                before = (*first.prompt_ids, *first.cycles[0].ids, *opening)
                part.append(Row((*before, *_further(second, dialect)), len(before)))
    return found


def _further(turn: SampledTrajectory, dialect: Dialect) -> tuple[int, ...]:
    """A sampled cycle as it follows an opening: without the tag that the opening has, and with the end of the turn."""
    ids, tag = turn.cycles[0].ids, tuple(dialect.encode(dialect.format.think_open)) if dialect.format.think_open else ()
    begins = tag and dialect.format.cycle_open.endswith(dialect.format.think_open) and ids[: len(tag)] == tag
    return (*(ids[len(tag) :] if begins else ids), dialect.end_of_turn_id)


def _right_rows(turns: Sequence[SampledTrajectory], dialect: Dialect, config: SftConfig, rng: Random) -> list[Row]:
    right = [turn for turn in turns if turn.is_right]
    drawn = rng.sample(right, min(len(right), config.rows_per_question))
    return [
        Row((*turn.prompt_ids, *turn.cycles[0].ids, dialect.end_of_turn_id), len(turn.prompt_ids)) for turn in drawn
    ]


def _drawn(found: Corrections, config: SftConfig, rng: Random) -> dict[str, list[Row]]:
    """All corrected rows, and a random share of the others."""
    if not found.corrected:
        return {"corrected": []}

    def share(rows: list[Row], of_corrected: float) -> list[Row]:
        return rng.sample(rows, min(len(rows), round(of_corrected * len(found.corrected))))

    return {
        "corrected": found.corrected,
        "confirmed": share(found.confirmed, config.confirmed_share),
        "kept": share(found.kept, config.kept_share),
    }


def _conversations(path: Path, tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> list[Row]:
    """A row of each line ``{"messages": [...]}``, whose last message is the assistant's. Raises ConfigError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            *before, last = json.loads(line)["messages"]
            if last["role"] != "assistant":
                raise ValueError("the last message is not the assistant's")
            prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            context = dialect.encode(cast(str, prompt))
            ids = (*context, *dialect.encode(last["content"]), dialect.end_of_turn_id)
        except Exception as error:  # a template raises its own classes
            raise ConfigError(
                f'{path}:{number}: not a conversation ({type(error).__name__}: {error}); a line is {{"messages": '
                '[{"role": …, "content": …}, …]}, the last one of the assistant'
            ) from error
        rows.append(Row(ids, len(context)))
    return rows


def _dataset(rows: Sequence[Row]) -> Any:
    labels = [[*[IGNORED] * row.num_context, *row.ids[row.num_context :]] for row in rows]
    return Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})


def trl_arguments(config: SftConfig) -> TrlConfig:
    """TRL's arguments: those of the config, then those of ``config.trainer``. Raises ConfigError."""
    folder, world = run_dir(config.output), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / FOLDER)
    if config.batch_size % (config.micro_batch * world):
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be split over {world} processes into micro batches of "
            f"{config.micro_batch}"
        )
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.batch_size // (config.micro_batch * world),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_length": config.max_length,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "seed": config.seed,
        "report_to": ["tensorboard"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": config.bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrlConfig(**own | config.trainer_arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer={config.trainer}: {error}") from error


class _Complete(TrainerCallback):
    """Mark each whole checkpoint, so that a killed run does not resume from a part of one."""

    def __init__(self, record: str) -> None:
        self._record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the last file of a checkpoint."""
        del control, kwargs
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self._record)
