"""Configs of the demo's training commands, for models of 3 M parameters on two cores."""

from dataclasses import dataclass
from pathlib import Path

from rtap_core.errors import ConfigError
from rtap_training.config.settings import check_positive, setting
from rtap_training.tasks import parse_mix

TASK_MIX = "countdown=0.4,arithmetic=0.2,knights=0.4"


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
    group_size: int = setting(
        56, "neighbouring texts of similar length: the batch size of a training that keeps the order"
    )
    vocab_size: int = setting(448, "tokens of a new tokenizer in all, added ones included")
    seed: int = setting(1, "seed of texts and weights")

    def __post_init__(self) -> None:
        Architecture.__post_init__(self)  # super() fails in a dataclass with slots
        check_positive(self, "num_texts", "group_size", "vocab_size")
        parse_mix(self.tasks)
