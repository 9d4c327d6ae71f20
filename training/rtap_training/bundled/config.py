"""Configs of the demo's training commands, for models of 3 M parameters on two cores."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config import BUNDLED, SamplerKind, check_positive, setting
from rtap_training.tasks import parse_mix

TASK_MIX = "countdown=0.4,arithmetic=0.2,knights=0.4"
# Fields that may differ when a run is resumed: they do not change the result.
_MAY_CHANGE = frozenset({"output", "threads", "eval_questions", "save_steps", "save_minutes"})


class Loss(StrEnum):
    """Training loss of a confidence generator.

    balanced: cross-entropy in which right and wrong cycles of a question weigh the same (R-TAP eq. 6). pairwise:
    the logistic loss of the difference between a right and a wrong cycle of the same question.
    """

    BALANCED = "balanced"
    PAIRWISE = "pairwise"


class Init(StrEnum):
    """Initial weights of a confidence generator: the policy's, or random ones of the same shape."""

    POLICY = "policy"
    SCRATCH = "scratch"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Size of the bundled Qwen3."""

    hidden_size: int = setting(192, "width")
    num_layers: int = setting(6, "depth")
    num_heads: int = setting(6, "query heads")
    num_kv_heads: int = setting(2, "key/value heads")
    head_dim: int = setting(32, "one of 32, 64, 96, 128 (what vLLM's CPU attention supports)")
    ffn_size: int = setting(576, "width of the feed-forward layers")

    def __post_init__(self) -> None:
        if self.head_dim not in (32, 64, 96, 128):
            raise ConfigError(f"head_dim={self.head_dim} is not supported by vLLM on CPUs; use 32, 64, 96 or 128")
        check_positive(self, "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")


@dataclass(frozen=True, slots=True)
class StartConfig(Architecture):
    """Untrained policy and texts of Think–Answer traces, for a cold start with ``rtap train sft``.

    Neither paper trains from scratch: all defaults are ours, for 3 M parameters on two cores (deploy/models).
    """

    output: Path = setting(Path("runs/start"), "folder of the untrained checkpoint and of texts.jsonl")
    tokenizer: Path | None = setting(None, "checkpoint whose tokenizer is used; a student needs its teacher's")
    tasks: str = setting(TASK_MIX, "share of each task, as NAME=WEIGHT with commas between")
    num_texts: int = setting(100_000, "training texts, about 70 tokens each")
    vocab_size: int = setting(448, "tokens of a new tokenizer in all, added ones included")
    seed: int = setting(1, "seed of texts and weights")

    def __post_init__(self) -> None:
        Architecture.__post_init__(self)  # super() fails in a dataclass with slots
        check_positive(self, "num_texts", "vocab_size")
        parse_mix(self.tasks)


@dataclass(frozen=True, slots=True)
class SampledTurnsConfig:
    """Common settings of ``demo-correct`` and ``demo-imitate``, which sample trajectories and train on them.

    Neither paper has these stages: all defaults are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE | {"samples_file"}
    policy: Path = setting(BUNDLED / "policy", "checkpoint to continue from")
    output: Path = setting(Path("runs/policy"), "where the checkpoint is written")
    samples_file: Path | None = setting(None, "file that keeps the sampled cycles")
    seed: int = setting(4, "seed of questions, sampling and training order")
    tasks: str = setting(TASK_MIX, "share of each task, as NAME=WEIGHT with commas between")
    questions: int = setting(8000, "training questions over all tasks")
    samples: int = setting(4, "trajectories a question")
    max_cycles: int = setting(2, "cycles a trajectory; forced open after wrong ones")
    sampler: SamplerKind = setting(SamplerKind.AUTO, "auto: vllm on GPUs, else transformers")
    threads: int = setting(1, "torch threads")
    minutes: float = setting(15.0, "wall-clock budget of the training loop")
    max_steps: int = setting(0, "train this many steps instead, however long they take (0: minutes)")
    batch_tokens: int = setting(4096, "padded tokens a step")
    matrix_rate: float = setting(0.003, "peak rate of Muon (warm-up, cosine to a tenth)")
    learning_rate: float = setting(1.5e-3, "peak rate of AdamW (embeddings, norms)")
    warmup_share: float = setting(0.05, "share of the budget spent warming up")
    eval_questions: int = setting(300, "held-out questions a task, one sample each")
    save_steps: int = setting(0, "steps between states to resume from (0: by minutes alone)")
    save_minutes: float = setting(5.0, "minutes between them; a kill costs no more")

    def __post_init__(self) -> None:
        check_positive(self, "max_cycles", "questions", "samples", "eval_questions", "threads")
        parse_mix(self.tasks)
        _check_loop(self)


@dataclass(frozen=True, slots=True)
class CorrectConfig(SampledTurnsConfig):
    """Train a policy to correct its own wrong cycles."""

    output: Path = setting(Path("runs/corrected"), "where the checkpoint is written")
    kept_share: float = setting(0.5, "right trajectories per epoch, for each corrected one")
    confirmed_share: float = setting(
        0.15, "right trajectories with a confirming cycle per epoch, for each corrected one"
    )

    def __post_init__(self) -> None:
        SampledTurnsConfig.__post_init__(self)  # super() fails in a dataclass with slots
        if self.kept_share < 0 or self.confirmed_share < 0:
            raise ConfigError(f"kept_share={self.kept_share} and confirmed_share={self.confirmed_share} must be >= 0")


@dataclass(frozen=True, slots=True)
class ImitateConfig(SampledTurnsConfig):
    """Supervised learning on a teacher's right trajectories: a baseline of RLAD."""

    policy: Path = setting(BUNDLED / "student", "student checkpoint to continue from")
    teacher: Path = setting(BUNDLED / "policy", "teacher checkpoint to sample from")
    output: Path = setting(Path("runs/imitated"), "where the student is written")
    max_cycles: int = setting(1, "cycles a trajectory; forced open after wrong ones")


@dataclass(frozen=True, slots=True)
class ConfidenceConfig:
    """Training of a confidence generator from the policy's own trajectories.

    Defaults without a named source are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE | {"samples_file", "eval_samples"}
    policy: Path = setting(BUNDLED / "policy", "checkpoint to sample and to start from")
    output: Path = setting(Path("runs/confidence"), "where the checkpoint is written")
    samples_file: Path | None = setting(None, "file that keeps the sampled cycles")
    seed: int = setting(2, "seed of questions, sampling and training order")
    questions: int = setting(2000, "training questions over all tasks")
    samples: int = setting(6, "trajectories a question. R-TAP: 128")
    sampler: SamplerKind = setting(SamplerKind.AUTO, "auto: vllm on GPUs, else transformers")
    loss: Loss = setting(Loss.BALANCED, "training loss. R-TAP eq. 6: balanced")
    init: Init = setting(Init.POLICY, "initial weights. R-TAP app. A: the policy's")
    num_layers: int = setting(0, "depth; the policy's first layers (0: all, as R-TAP app. A)")
    max_cycles: int = setting(3, "cycles a trajectory; forced open after wrong ones")
    tasks: str = setting(TASK_MIX, "share of each task, as NAME=WEIGHT with commas between")
    synthetic_pairs: int = setting(3, "synthetic right and hard wrong cycles a question")
    validation_share: float = setting(0.1, "questions kept for calibration and threshold")
    fuse: bool = setting(True, "combine the generator with the policy's log-probabilities when serving")
    threads: int = setting(1, "torch threads")
    minutes: float = setting(6.0, "wall-clock budget of the training loop")
    max_steps: int = setting(0, "train this many steps instead, however long they take (0: minutes)")
    batch_tokens: int = setting(4096, "padded tokens a step")
    matrix_rate: float = setting(0.002, "peak rate of Muon (warm-up, cosine to a tenth)")
    learning_rate: float = setting(1e-3, "peak rate of AdamW (embeddings, head, norms)")
    weight_decay: float = setting(0.02, "weight decay of matrices")
    global_weight: float = setting(0.25, "weight of questions all right or all wrong")
    warmup_share: float = setting(0.03, "share of the budget spent warming up")
    eval_questions: int = setting(500, "held-out questions a task")
    eval_samples: int = setting(8, "trajectories a held-out question")
    save_steps: int = setting(0, "steps between states to resume from (0: by minutes alone)")
    save_minutes: float = setting(5.0, "minutes between them; a kill costs no more")

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} must be at least 2: a single answer has no contrast")
        check_positive(self, "max_cycles", "questions", "eval_questions", "eval_samples", "threads")
        if self.synthetic_pairs < 0 or self.num_layers < 0:
            raise ConfigError(
                f"synthetic_pairs={self.synthetic_pairs} and num_layers={self.num_layers} must not be negative"
            )
        parse_mix(self.tasks)
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share={self.validation_share} must be between 0 and 1")
        if not 0 <= self.global_weight <= 1:
            raise ConfigError(f"global_weight={self.global_weight} must be in [0, 1]")
        _check_loop(self)


def _check_loop(config: SampledTurnsConfig | ConfidenceConfig) -> None:
    if config.minutes <= 0 or config.save_minutes <= 0 or config.batch_tokens < 256:
        raise ConfigError(
            f"minutes={config.minutes} and save_minutes={config.save_minutes} must be positive, and "
            f"batch_tokens={config.batch_tokens} at least 256"
        )
    if config.max_steps < 0 or config.save_steps < 0:
        raise ConfigError(f"max_steps={config.max_steps} and save_steps={config.save_steps} must not be negative")
    if not 0 < config.warmup_share < 1:
        raise ConfigError(f"warmup_share={config.warmup_share} must be between 0 and 1")
