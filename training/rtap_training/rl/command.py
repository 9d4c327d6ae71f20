"""Reinforcement-learning commands: load, start or resume, train, save checkpoints for ``rtap serve``."""

import json
import os
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from rtap_core.artifact import read_artifact
from rtap_core.errors import ConfigError
from rtap_training.checkpoint import manifest
from rtap_training.config.rl import RlConfig
from rtap_training.data.questions import Question, is_right, load_questions
from rtap_training.events import FOLDER
from rtap_training.models.loading import Loaded, load_for_training, lora_config
from rtap_training.models.online_generator import OnlineGenerator, load_online_generator
from rtap_training.models.output import save_generator_adapter, save_policy, write_model
from rtap_training.models.teacher import LocalTeacher, RemoteTeacher, Teacher, check_same_tokens, load_teacher
from rtap_training.rl.checkpoints import JsonLog, SamplesTable, check_same_run, describe, last_checkpoint
from rtap_training.rl.components import RunComponents
from rtap_training.rl.dataset import build_dataset
from rtap_training.rl.trainer import RecursiveTrainer
from rtap_training.run_state import step_of
from rtap_training.runtime import configure_torch, end_processes
from rtap_training.tasks.base import Split


def run(config: RlConfig) -> None:
    """Train and write ``config.output``. Resumes from the run's last complete checkpoint."""
    configure_torch(config.threads, config.seed)
    checkpoint = last_checkpoint(config.run_dir)
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    questions = load_questions(config.questions, Split.TRAIN, seed=config.seed, count=config.num_questions)
    dtype = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32
    loaded = load_for_training(config.policy, config.template_kwargs, dtype=dtype)
    trainer = build_trainer(config, loaded, questions)
    log = JsonLog(
        config.run_dir / "train.jsonl",
        resumed_at=step_of(checkpoint) if checkpoint else 0,
        is_writer=trainer.is_world_process_zero(),
    )
    trainer.add_callback(log)
    is_first = trainer.is_world_process_zero()
    trainer.add_callback(SamplesTable(config.run_dir / FOLDER, lambda: trainer.samples, is_writer=is_first))
    started = monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # collective call
    if trainer.is_world_process_zero():
        data = "\n".join(q.question for q in questions)
        record = manifest(f"rtap train {config.method}", config, data=data, seconds=monotonic() - started,
                          figures=log.last)  # fmt: skip
        _save(config, trainer, weights, loaded, record)
        sys.stdout.write(json.dumps(log.last, indent=2) + "\n")
    end_processes(trainer.accelerator)


def build_trainer(config: RlConfig, loaded: Loaded, questions: Sequence[Question]) -> RecursiveTrainer:
    """Build the trainer with generator and teacher."""

    def check(row: int, answer: str) -> bool:
        return is_right(questions[row], answer)

    components = RunComponents(loaded.dialect, check, None, None, record=lambda: describe(config))
    trainer = RecursiveTrainer(
        config=config,
        components=components,
        args=trl_arguments(config),
        model=loaded.model,
        processing_class=loaded.processor,
        train_dataset=build_dataset(questions, config.prompt, config.system_prompt, sees_images=loaded.sees_images),
        peft_config=lora_config(config.lora_rank, sees_images=loaded.sees_images) if config.lora_rank else None,
    )
    components.generator = _generator(config, loaded, trainer)
    components.teacher = _teacher(config, loaded, trainer)
    return trainer


def trl_arguments(config: RlConfig) -> GRPOConfig:
    """TRL arguments of a config. TRL's loss and advantage options are unused: ours replace them."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental; TRL is pinned
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.run_dir / FOLDER)
    # Otherwise one process per machine loads weights and FSDP broadcasts only the policy's, so that generator, teacher
    # and reference model would differ between processes.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    rows = rows_of_a_process(config, int(os.environ.get("WORLD_SIZE", "1")))
    micro_batch = min(config.micro_batch, rows)
    vllm: dict[str, Any] = {}
    if config.vllm != "none":
        # Per token, truncated at 2: sequence masking would discard long rows (trl#4772).
        vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": 2.0}  # fmt: skip
        if config.vllm != "colocate":
            vllm |= {"vllm_mode": "server", "vllm_server_base_url": config.vllm}
    return GRPOConfig(
        output_dir=str(config.run_dir),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=config.group_size,
        num_iterations=config.num_iterations,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        beta=config.beta,
        epsilon=config.clip_low,
        epsilon_high=config.clip_high,
        loss_type="grpo",
        max_completion_length=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        chat_template_kwargs=config.template_kwargs,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        seed=config.seed,
        report_to=["tensorboard"],
        use_cpu=not torch.cuda.is_available(),
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **vllm,
    )


def rows_of_a_process(config: RlConfig, num_processes: int) -> int:
    """Sequences of a generation in each process. Raises ConfigError if they cannot be split."""
    rows, rest = divmod(config.generation_rows, num_processes)
    if rest or rows % min(config.micro_batch, max(rows, 1)):
        raise ConfigError(
            f"group_size*questions_per_step={config.generation_rows} sequences over {num_processes} processes cannot "
            f"be split into micro batches of {config.micro_batch}; change questions_per_step or micro_batch"
        )
    return rows


def _generator(config: RlConfig, loaded: Loaded, trainer: RecursiveTrainer) -> OnlineGenerator | None:
    if config.confidence is None:
        return None
    model = load_online_generator(config.confidence, bf16=config.bf16)
    if read_artifact(model.config.to_dict()).input == "chat":
        raise ConfigError(f"the generator {config.confidence} reads chats: train one of this policy, without backbone")
    readable = cast(int, model.get_input_embeddings().num_embeddings)
    if readable < len(loaded.tokenizer):
        raise ConfigError(
            f"the generator {config.confidence} has {readable} token ids, the policy {len(loaded.tokenizer)}; "
            "train the generator from this policy"
        )
    model.to(trainer.accelerator.device)

    def average(tensors: Sequence[Tensor]) -> None:
        if trainer.accelerator.num_processes > 1:
            for tensor in tensors:
                tensor.copy_(cast(Tensor, trainer.accelerator.reduce(tensor, reduction="mean")))

    return OnlineGenerator(
        model,
        learning_rate=config.generator_rate,
        iterations=config.generator_iterations,
        global_weight=config.generator_global_weight,
        average=average,
        bf16=config.bf16,
    )


def _teacher(config: RlConfig, loaded: Loaded, trainer: RecursiveTrainer) -> Teacher | None:
    if config.teacher is None:
        return None
    if loaded.sees_images:
        raise ConfigError("a teacher reads token ids only and cannot score a vision-language policy; remove teacher")
    if config.teacher.startswith(("http://", "https://")):
        if config.temperature != 1:
            raise ConfigError(
                f"a remote teacher scores at temperature 1, not {config.temperature}; "
                "set temperature=1 or use a local teacher"
            )
        remote = RemoteTeacher(config.teacher)
        if remote.context_length is not None and config.max_tokens >= remote.context_length:
            raise ConfigError(
                f"max_tokens={config.max_tokens} leaves no room for a prompt in the teacher's context of "
                f"{remote.context_length}; lower it, or serve the teacher with a larger --max-model-len"
            )
        remote.check_same_tokens(loaded.tokenizer, config.template_kwargs)
        return remote
    model = load_teacher(config.teacher)
    check_same_tokens(loaded.tokenizer, AutoTokenizer.from_pretrained(config.teacher), config.template_kwargs)
    add_fused_lm_head(model, temperature=config.temperature)
    model.to(trainer.accelerator.device)
    return LocalTeacher(model, trainer.log_probs)


def _save(
    config: RlConfig, trainer: RecursiveTrainer, weights: dict[str, Tensor], loaded: Loaded, record: dict[str, Any]
) -> None:
    """Save policy and generator, each atomically."""
    save_policy(
        config.output,
        trainer.model,
        weights,
        loaded,
        record,
        merge_into=config.policy if config.merge else None,
        continues=config.max_cycles > 1,
    )
    if trainer.components.generator is not None:
        output = config.confidence_output or config.output.with_name(f"{config.output.name}-confidence")
        generator = trainer.components.generator.model
        # These were fitted to the old policy; `rtap train generator` fits them again.
        block = cast(dict[str, Any], getattr(generator.config, "rtap", None) or {})
        for name in ("logistic", "fusion", "threshold", "calibration"):
            block.pop(name, None)
        if isinstance(generator, PeftModel):
            save_generator_adapter(output, generator, generator.config, record)
        else:
            write_model(output, generator, generator.state_dict(), loaded.tokenizer, record)
