"""Arguments of a Trainer, and a run that resumes from its last whole checkpoint, for ``sft`` and ``generator``."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rtap_core.errors import ConfigError
from rtap_training.checkpoint import sha256
from rtap_training.config.settings import run_dir
from rtap_training.config.supervised import SupervisedConfig
from rtap_training.events import FOLDER
from rtap_training.muon import MuonAdamW
from rtap_training.rl.checkpoints import JsonLog, last_checkpoint
from rtap_training.run_state import check_same_settings, describe, mark_complete, plain, step_of

Arguments = TypeVar("Arguments", bound=TrainingArguments)
_MAY_REPLACE = frozenset({
    "lr_scheduler_type", "warmup_steps", "report_to", "logging_steps", "save_total_limit", "train_sampling_strategy",
    "ddp_find_unused_parameters",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of a run. weights: by name, in the main process. figures: last line of the log. seconds: of this process,
    since it was started or resumed."""

    weights: dict[str, Any]
    figures: dict[str, Any]
    seconds: float


def trainer_arguments(kind: type[Arguments], config: SupervisedConfig, **more: Any) -> Arguments:
    """Arguments of a Trainer: those of the config, ``more``, then those of ``config.trainer``. Raises ConfigError."""
    folder, world = run_dir(config.output), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / FOLDER)
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(config, world),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
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
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 86_400,  # seconds: processes wait while the first one samples
    } | more
    if taken := sorted((own.keys() - _MAY_REPLACE) & config.trainer_arguments.keys()):
        raise ConfigError(f"trainer={config.trainer}: {', '.join(taken)} is set by a flag of this command")
    try:
        return kind(**own | config.trainer_arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer={config.trainer}: {error}") from error


def optimizer(config: SupervisedConfig, arguments: TrainingArguments) -> Any:
    """The Trainer's ``optimizer_cls_and_kwargs``: Muon and AdamW with a ``matrix_rate``, else its own choice."""
    if not config.matrix_rate:
        return None
    # The Trainer calls the first without arguments, and the result with the model and the second.
    return lambda: MuonAdamW, {
        "matrix_rate": config.matrix_rate,
        "learning_rate": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "weight_decay": arguments.weight_decay,
    }


def accumulation_steps(config: SupervisedConfig, processes: int) -> int:
    """Micro batches an update in each process. Raises ConfigError if the batch cannot be split."""
    steps, rest = divmod(config.batch_size, config.micro_batch * processes)
    if rest:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be split over {processes} processes into micro batches of "
            f"{config.micro_batch}"
        )
    return steps


def check_resumable(config: SupervisedConfig) -> None:
    """Raise ConfigError if the run that writes ``config.output`` was started with other settings."""
    checkpoint = last_checkpoint(run_dir(config.output))
    if checkpoint is not None:
        settings = plain(config)
        check_same_settings(checkpoint, settings, [name for name in settings if name not in config.MAY_CHANGE])


def run_trainer(trainer: Trainer, config: SupervisedConfig, *, data: str) -> Trained:
    """Train from the run's last complete checkpoint, if any. data: text that identifies the training data.

    Raises ConfigError if the checkpoint was made with other data; ``check_resumable`` compares the settings."""
    checkpoint = last_checkpoint(run_dir(config.output))
    settings = plain(config) | {"data_sha256": sha256(data)}
    if checkpoint is not None:
        check_same_settings(checkpoint, settings, ["data_sha256"])
    log = JsonLog(
        run_dir(config.output) / "train.jsonl",
        resumed_at=step_of(checkpoint) if checkpoint else 0,
        is_writer=trainer.is_world_process_zero(),
    )
    trainer.add_callback(log)
    trainer.add_callback(_Complete(describe(settings), trainer.accelerator.wait_for_everyone))
    started = monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # collective call
    last = next((line for line in reversed(trainer.state.log_history) if "loss" in line), {})
    return Trained(weights, last, monotonic() - started)


class _Complete(TrainerCallback):
    """Mark each whole checkpoint, so that a killed run does not resume from a part of one."""

    def __init__(self, record: str, wait_for_everyone: Callable[[], None]) -> None:
        self._record, self._wait_for_everyone = record, wait_for_everyone

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after the last file of a checkpoint."""
        del control, kwargs
        self._wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", self._record)
