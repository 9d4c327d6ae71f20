"""Typed configs of the training commands: defaults, then a YAML file, then flags. Unknown keys are refused."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from server.rtap.errors import ConfigError

BUNDLED = Path("deploy/models")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Cold start of a policy from nothing on Think–Answer traces."""

    output: Path = _setting(BUNDLED / "policy", "where the checkpoint is written (replaced at once, when complete)")
    seed: int = _setting(1, "seed of data, weights and evaluation sampling")
    minutes: float = _setting(30.0, "wall-clock budget of the training loop; the learning rate follows it")
    max_steps: int = _setting(0, "stop after this many steps even before the budget (0: no limit)")
    threads: int = _setting(2, "torch threads")
    batch_tokens: int = _setting(4096, "padded tokens a step")
    learning_rate: float = _setting(2e-3, "peak learning rate (AdamW, warm-up, cosine to a tenth)")
    weight_decay: float = _setting(0.05, "AdamW weight decay of matrices")
    warmup_share: float = _setting(0.03, "share of the budget spent warming up")
    countdown_share: float = _setting(0.6, "share of Countdown; the rest is arithmetic")
    vocab_size: int = _setting(448, "tokens in all, added ones included")
    hidden_size: int = _setting(192, "width")
    num_layers: int = _setting(6, "depth")
    num_heads: int = _setting(6, "query heads")
    num_kv_heads: int = _setting(2, "key/value heads")
    head_dim: int = _setting(32, "one of 32, 64, 96, 128 (what vLLM's CPU attention supports)")
    ffn_size: int = _setting(576, "width of the feed-forward layers")
    eval_questions: int = _setting(300, "held-out questions a task, sampled once each at temperature 1")
    save_minutes: float = _setting(5.0, "minutes between snapshots beside the output")

    def __post_init__(self) -> None:
        if self.head_dim not in (32, 64, 96, 128):
            raise ConfigError(f"head_dim={self.head_dim} is not served by vLLM on CPU; use 32, 64, 96 or 128")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if not 0 <= self.countdown_share <= 1:
            raise ConfigError(f"countdown_share={self.countdown_share} must be in [0, 1]")
        if self.minutes <= 0 or self.batch_tokens < 256:
            raise ConfigError("minutes must be positive and batch_tokens at least 256")


@dataclass(frozen=True, slots=True)
class ConfidenceConfig:
    """Training of a confidence generator from the policy's own trajectories."""

    policy: Path = _setting(BUNDLED / "policy", "checkpoint that is sampled and that the generator starts from")
    output: Path = _setting(BUNDLED / "confidence", "where the checkpoint is written")
    seed: int = _setting(2, "seed of questions, sampling and training order")
    questions: int = _setting(4000, "training questions over both tasks")
    samples: int = _setting(8, "trajectories a question")
    max_cycles: int = _setting(3, "cycles a trajectory; a cycle is forced open after every wrong one")
    countdown_share: float = _setting(0.6, "share of Countdown; the rest is arithmetic")
    negative_share: float = _setting(0.15, "synthetic hard negatives, as a share of the sampled Countdown cycles")
    threads: int = _setting(2, "torch threads")
    minutes: float = _setting(12.0, "wall-clock budget of the training loop")
    max_steps: int = _setting(0, "stop after this many steps even before the budget (0: no limit)")
    batch_tokens: int = _setting(4096, "padded tokens a step")
    learning_rate: float = _setting(5e-4, "peak learning rate (AdamW, warm-up, cosine to a tenth)")
    weight_decay: float = _setting(0.05, "AdamW weight decay of matrices")
    global_weight: float = _setting(0.25, "weight of questions without contrast (all right or all wrong)")
    eval_questions: int = _setting(500, "held-out questions a task")

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} must be at least 2: one answer has no contrast")
        if self.max_cycles < 1:
            raise ConfigError(f"max_cycles={self.max_cycles} must be at least 1")
        if not 0 <= self.global_weight <= 1:
            raise ConfigError(f"global_weight={self.global_weight} must be in [0, 1]")
        if self.minutes <= 0 or self.batch_tokens < 256:
            raise ConfigError("minutes must be positive and batch_tokens at least 256")


Config = TypeVar("Config", SftConfig, ConfidenceConfig)


def add_flags(parser: argparse.ArgumentParser, config: type[SftConfig] | type[ConfidenceConfig]) -> None:
    """One flag per field, and ``--config``."""
    parser.add_argument("--config", type=Path, help="YAML file with the same names as the flags; flags win")
    types = get_type_hints(config)
    for item in fields(config):
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            type=types[item.name],
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {item.default})",
        )


def build_config(config: type[Config], file: Path | None, flags: dict[str, Any]) -> Config:
    """Merge file and flags over the defaults. Raises ConfigError on unknown keys and wrong types."""
    types = get_type_hints(config)
    values: dict[str, Any] = _read_yaml(file) if file else {}
    values |= flags
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(f"unknown settings {unknown}; known are {sorted(types)}")
    return config(**{name: _coerce(name, value, types[name]) for name, value in values.items()})


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold `name: value` lines")
    return {str(key): value for key, value in cast(dict[Any, Any], loaded).items()}


def _coerce(name: str, value: Any, kind: type) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
    return value
