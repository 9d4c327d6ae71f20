"""Config of ``rtap train generator``."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config import check_positive, setting
from rtap_training.evaluation.question_files import check_prompt


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Confidence generator for any Hugging Face model, trained on your questions.

    Defaults are for models of billions of parameters on a GPU; fields name R-TAP where a value is the paper's.
    """

    # batch_rows may change too: after running out of memory, resume with smaller batches.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"output", "threads", "batch_rows", "save_steps", "save_minutes"})
    policy: str = setting("policy", "policy, as `rtap serve` loads it: a folder or a Hugging Face name")
    questions: str = setting("", "JSONL file, rg:NAME, hf:NAME, or a mix of bundled tasks")
    prompt: str = setting("", "message with {question} in it; empty: the question, for rg: also to answer in a box")
    samples_file: Path | None = setting(None, "samples.jsonl of `rtap eval` or `rtap calibrate`, instead of questions")
    backbone: str = setting("", "model whose body is trained, in its own chat template. R-TAP app. A: the policy")
    num_layers: int = setting(0, "first layers of the backbone to keep; 0: all, as R-TAP app. A")
    lora_rank: int = setting(0, "train LoRA adapters of this rank; 0: all weights. Ours")
    merge: bool = setting(False, "with lora_rank: write the whole classifier, not the adapter alone")
    bf16: bool = setting(False, "compute in bfloat16; with lora_rank the frozen weights are kept in it too")
    output: Path = setting(Path("runs/generator"), "where the checkpoint is written")
    num_questions: int = setting(2000, "training questions at most")
    eval_questions: int = setting(200, "held-out questions at most, of the tenth that is held out by hash")
    samples: int = setting(8, "trajectories a question. R-TAP: 128")
    max_cycles: int = setting(2, "cycles a trajectory; a wrong cycle is followed by another")
    max_cycle_tokens: int = setting(2048, "tokens a cycle at most")
    batch_rows: int = setting(64, "trajectories sampled side by side")
    epochs: int = setting(2, "passes over the questions")
    questions_per_step: int = setting(8, "questions a training step")
    learning_rate: float = setting(1e-5, "AdamW learning rate; about 2e-4 with lora_rank")
    global_weight: float = setting(0.25, "weight of questions all right or all wrong")
    validation_share: float = setting(0.2, "training questions kept for calibration and threshold")
    seed: int = setting(2, "seed of questions, sampling, head weights and training order")
    threads: int = setting(1, "torch threads")
    save_steps: int = setting(0, "steps between states to resume from (0: by minutes alone)")
    save_minutes: float = setting(20.0, "minutes between states to resume from")

    def __post_init__(self) -> None:
        if bool(self.questions) == (self.samples_file is not None):
            raise ConfigError(
                f"questions={self.questions!r} and samples_file={self.samples_file}: give questions (a JSONL file, "
                "rg:NAME, hf:NAME or a bundled task) to sample the policy on, or the file, and not both"
            )
        if self.prompt:
            check_prompt("prompt=", self.prompt)
        if self.prompt and self.samples_file is not None:
            raise ConfigError("a samples_file has the messages that were sent: leave out prompt")
        if self.merge and not self.lora_rank:
            raise ConfigError("merge needs lora_rank: without adapters there is nothing to merge")
        if self.num_layers < 0 or self.lora_rank < 0:
            raise ConfigError(f"num_layers={self.num_layers} and lora_rank={self.lora_rank} must be at least 0")
        check_positive(self, "num_questions", "eval_questions", "max_cycles", "max_cycle_tokens", "batch_rows",
                       "epochs", "questions_per_step", "threads")  # fmt: skip
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} must be at least 2: a single answer has no contrast")
        if self.save_steps < 0 or self.save_minutes <= 0:
            raise ConfigError(f"save_steps={self.save_steps} must be >= 0, save_minutes={self.save_minutes} above 0")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share={self.validation_share} must be between 0 and 1")
        if not 0 <= self.global_weight <= 1:
            raise ConfigError(f"global_weight={self.global_weight} must be in [0, 1]")
