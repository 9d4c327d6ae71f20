"""Config of ``rtap train sft``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config import check_positive, setting

RIGHT, CORRECTIONS = "right", "corrections"


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Supervised training of any Hugging Face model: a cold start of R-TAP (sec. 3.1), or imitation of a teacher.

    Neither paper states values: all defaults are ours."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"output", "threads", "save_steps", "merge"})
    policy: str = setting("policy", "model to train: a folder or a Hugging Face name")
    data: str = setting(
        CORRECTIONS,
        f"JSONL file of conversations (messages), or with samples_file: {CORRECTIONS} (each sample followed by a right "
        f"one), {RIGHT} (right samples alone; of a teacher: imitation)",
    )
    samples_file: Path | None = setting(None, "samples.jsonl of `rtap eval` or `rtap calibrate`")
    output: Path = setting(Path("runs/sft"), "checkpoint or adapter to write; logs and checkpoints are in OUTPUT.run")
    lora_rank: int = setting(0, "train LoRA adapters of this rank; 0: all weights")
    merge: bool = setting(False, "with lora_rank: write a whole checkpoint instead of an adapter")
    rows_per_question: int = setting(4, "rows of each kind a question at most")
    kept_share: float = setting(0.5, "right first cycles, for each corrected one")
    confirmed_share: float = setting(0.5, "right cycles after a right one, for each corrected one")
    epochs: int = setting(1, "passes over the rows")
    batch_size: int = setting(16, "rows an update")
    micro_batch: int = setting(8, "rows a forward pass")
    learning_rate: float = setting(1e-5, "peak rate; about 2e-4 with lora_rank")
    matrix_rate: float = setting(0.0, "train the layers' matrices by Muon at this peak rate; 0: all weights by AdamW")
    max_length: int = setting(2048, "longer rows are left out")
    seed: int = setting(4, "seed of rows and their order")
    threads: int = setting(1, "torch threads; use more only on idle cores")
    save_steps: int = setting(100, "updates between checkpoints to resume from")
    bf16: bool = setting(False, "compute in bfloat16; with lora_rank the frozen weights are kept in it too")
    gradient_checkpointing: bool = setting(False, "recompute activations (large models)")
    trainer: str = setting("{}", "JSON of further arguments of TRL's SFTConfig, such as a scheduler or report_to")

    def __post_init__(self) -> None:
        if (self.samples_file is None) == (self.data in (RIGHT, CORRECTIONS)):
            raise ConfigError(
                f"data={self.data} and samples_file={self.samples_file}: {RIGHT} and {CORRECTIONS} need a "
                "samples_file, a file of conversations needs none"
            )
        if self.matrix_rate and self.lora_rank:
            raise ConfigError(f"matrix_rate={self.matrix_rate} needs all weights: leave out lora_rank={self.lora_rank}")
        if self.merge and not self.lora_rank:
            raise ConfigError("merge=True needs a lora_rank: without adapters the output is a whole checkpoint")
        check_positive(self, "rows_per_question", "epochs", "batch_size", "micro_batch", "max_length", "threads",
                       "save_steps")  # fmt: skip
        if self.batch_size % self.micro_batch:
            raise ConfigError(f"micro_batch={self.micro_batch} must divide batch_size={self.batch_size}")
        for name in ("kept_share", "confirmed_share", "lora_rank", "matrix_rate"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive")
        _ = self.trainer_arguments

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Further arguments of TRL's SFTConfig. Raises ConfigError."""
        try:
            found: Any = json.loads(self.trainer)
        except ValueError as error:
            raise ConfigError(f"trainer={self.trainer!r} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"trainer={self.trainer!r} must be a JSON object of arguments of TRL's SFTConfig")
        return found
