"""Settings of samples and Trainer that ``sft`` and ``generator`` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config.settings import (
    TEMPLATE_KWARGS,
    SamplerKind,
    check_positive,
    json_object,
    setting,
    template_kwargs,
)
from rtap_training.evaluation.question_files import check_prompt


@dataclass(frozen=True, slots=True)
class SupervisedConfig:
    """Settings of ``sft`` and ``generator``."""

    # micro_batch changes what fits into memory, not which rows make an update.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"output", "threads", "batch_rows", "micro_batch", "save_steps", "merge"}
    )
    policy: str = setting("policy", "model, as `rtap serve` loads it: a folder or a Hugging Face name")
    output: Path = setting(Path("runs/supervised"), "what is written; logs and checkpoints are in OUTPUT.run")
    questions: str = setting("", "questions to sample: JSONL file, rg:NAME, hf:NAME, or a mix of bundled tasks")
    prompt: str = setting("", "message with {question} in it; empty: the question, for rg: also to answer in a box")
    chat_template_kwargs: str = setting("{}", TEMPLATE_KWARGS)
    samples_file: Path | None = setting(None, "samples.jsonl of `rtap eval` or `rtap calibrate`, instead of questions")
    num_questions: int = setting(2000, "training questions at most")
    samples: int = setting(8, "samples a question")
    max_cycle_tokens: int = setting(2048, "tokens a sampled cycle at most")
    sampler: SamplerKind = setting(SamplerKind.AUTO, "auto: vllm on GPUs, else transformers")
    batch_rows: int = setting(64, "rows that transformers samples side by side")
    lora_rank: int = setting(0, "train LoRA adapters of this rank; 0: all weights")
    merge: bool = setting(False, "with lora_rank: write a whole checkpoint instead of an adapter")
    epochs: int = setting(1, "passes over the rows")
    batch_size: int = setting(16, "rows an update")
    micro_batch: int = setting(8, "rows a forward pass")
    learning_rate: float = setting(1e-5, "peak rate; about 2e-4 with lora_rank")
    matrix_rate: float = setting(0.0, "train the layers' matrices by Muon at this peak rate; 0: all weights by AdamW")
    bf16: bool = setting(False, "compute in bfloat16; with lora_rank the frozen weights are kept in it too")
    gradient_checkpointing: bool = setting(False, "recompute activations (large models)")
    seed: int = setting(4, "seed of questions, sampling, new weights, and order of rows")
    threads: int = setting(1, "torch threads; use more only on idle cores")
    save_steps: int = setting(100, "updates between checkpoints to resume from")
    trainer: str = setting("{}", "JSON of further arguments of the Trainer, such as a scheduler or report_to")

    def __post_init__(self) -> None:
        if self.prompt:
            check_prompt("prompt=", self.prompt)
        if self.prompt and not self.questions:
            raise ConfigError("prompt is for questions; a samples_file has the messages that were sent")
        if self.merge and not self.lora_rank:
            raise ConfigError("merge needs lora_rank: without adapters there is nothing to merge")
        check_positive(self, "num_questions", "max_cycle_tokens", "batch_rows", "epochs", "batch_size", "micro_batch",
                       "threads", "save_steps")  # fmt: skip
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} must be at least 2: a single answer has no contrast")
        if self.batch_size % self.micro_batch:
            raise ConfigError(f"micro_batch={self.micro_batch} must divide batch_size={self.batch_size}")
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank={self.lora_rank} must be at least 0")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive")
        if not self.matrix_rate >= 0:
            raise ConfigError(f"matrix_rate={self.matrix_rate} must be at least 0")
        if self.matrix_rate and self.lora_rank:
            raise ConfigError(f"matrix_rate={self.matrix_rate} needs all weights: leave out lora_rank={self.lora_rank}")
        _ = self.trainer_arguments, self.template_kwargs

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Further arguments of the Trainer. Raises ConfigError."""
        return json_object("trainer", self.trainer)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template. Raises ConfigError."""
        return template_kwargs(self.chat_template_kwargs)
