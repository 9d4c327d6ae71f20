"""Configs of the demo's training commands, for models of 3 M parameters on two cores."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config import setting
from rtap_training.tasks import parse_mix

TASK_MIX = "countdown=0.4,arithmetic=0.2,knights=0.4"
# Fields that may differ when a run is resumed: they do not change the result.
_MAY_CHANGE = frozenset({"output", "threads", "eval_questions", "save_steps", "save_minutes"})


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Cold start of a policy from random weights on Think–Answer traces.

    Neither paper trains from scratch: all defaults are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE
    output: Path = setting(Path("runs/policy"), "where the checkpoint is written")
    initial: Path | None = setting(None, "checkpoint to continue from; fixes tokenizer and shape")
    tokenizer: Path | None = setting(None, "checkpoint whose tokenizer a new model uses; a student needs its teacher's")
    seed: int = setting(1, "seed of data, weights and evaluation sampling")
    minutes: float = setting(30.0, "training budget; the learning rate follows it")
    max_steps: int = setting(0, "train this many steps instead, however long they take (0: minutes)")
    processes: int = setting(2, "data-parallel processes")
    threads: int = setting(1, "torch threads a process")
    batch_tokens: int = setting(2048, "padded tokens a step and process")
    matrix_rate: float = setting(0.02, "peak rate of Muon (warm-up, cosine to a tenth)")
    learning_rate: float = setting(2e-3, "peak rate of AdamW (embeddings, norms)")
    weight_decay: float = setting(0.02, "weight decay of matrices")
    warmup_share: float = setting(0.03, "share of the budget spent warming up")
    tasks: str = setting(TASK_MIX, "share of each task, as NAME=WEIGHT with commas between")
    vocab_size: int = setting(448, "tokens of a new tokenizer in all, added ones included")
    hidden_size: int = setting(192, "width")
    num_layers: int = setting(6, "depth")
    num_heads: int = setting(6, "query heads")
    num_kv_heads: int = setting(2, "key/value heads")
    head_dim: int = setting(32, "one of 32, 64, 96, 128 (what vLLM's CPU attention supports)")
    ffn_size: int = setting(576, "width of the feed-forward layers")
    eval_questions: int = setting(300, "held-out questions a task, one sample each")
    save_steps: int = setting(0, "steps between states to resume from (0: by minutes alone)")
    save_minutes: float = setting(5.0, "minutes between them; a kill costs no more")

    def __post_init__(self) -> None:
        if self.initial is not None and self.tokenizer is not None:
            raise ConfigError(
                f"initial={self.initial} has its own tokenizer; leave out tokenizer={self.tokenizer}, or leave out "
                "initial to train new weights with that tokenizer"
            )
        if self.head_dim not in (32, 64, 96, 128):
            raise ConfigError(f"head_dim={self.head_dim} is not supported by vLLM on CPUs; use 32, 64, 96 or 128")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.processes < 1 or self.threads < 1:
            raise ConfigError(f"processes={self.processes} and threads={self.threads} must be at least 1")
        parse_mix(self.tasks)
        _check_loop(self)


def _check_loop(config: SftConfig) -> None:
    if config.minutes <= 0 or config.save_minutes <= 0 or config.batch_tokens < 256:
        raise ConfigError(
            f"minutes={config.minutes} and save_minutes={config.save_minutes} must be positive, and "
            f"batch_tokens={config.batch_tokens} at least 256"
        )
    if config.max_steps < 0 or config.save_steps < 0:
        raise ConfigError(f"max_steps={config.max_steps} and save_steps={config.save_steps} must not be negative")
    if not 0 < config.warmup_share < 1:
        raise ConfigError(f"warmup_share={config.warmup_share} must be between 0 and 1")
