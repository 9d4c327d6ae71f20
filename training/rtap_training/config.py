"""Configs of the training commands. Flags override a YAML file, which overrides defaults."""

import argparse
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, get_args, get_type_hints

import yaml

from rtap_core.artifact import BUNDLED_MODELS
from rtap_core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
from rtap_training.tasks import parse_mix


class SamplerKind(StrEnum):
    """Sampling backend. auto: vLLM if it is installed and a GPU is present, else transformers."""

    AUTO = "auto"
    VLLM = "vllm"
    TRANSFORMERS = "transformers"


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


BUNDLED = BUNDLED_MODELS
TASK_MIX = "countdown=0.4,arithmetic=0.2,knights=0.4"
# Fields that may differ when a run is resumed: they do not change the result.
_MAY_CHANGE = frozenset({"output", "threads", "eval_questions", "save_steps", "save_minutes"})


def setting(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata=_help(text))


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, slots=True)
class SftConfig:
    """Cold start of a policy from random weights on Think–Answer traces.

    Neither paper trains from scratch: all defaults are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE
    output: Path = field(default=Path("runs/policy"), metadata=_help("where the checkpoint is written"))
    initial: Path | None = field(default=None, metadata=_help("checkpoint to continue from; fixes tokenizer and shape"))
    tokenizer: Path | None = field(
        default=None, metadata=_help("checkpoint whose tokenizer a new model uses; a student needs its teacher's")
    )
    seed: int = field(default=1, metadata=_help("seed of data, weights and evaluation sampling"))
    minutes: float = field(default=30.0, metadata=_help("training budget; the learning rate follows it"))
    max_steps: int = field(
        default=0, metadata=_help("train this many steps instead, however long they take (0: minutes)")
    )
    processes: int = field(default=2, metadata=_help("data-parallel processes"))
    threads: int = field(default=1, metadata=_help("torch threads a process"))
    batch_tokens: int = field(default=2048, metadata=_help("padded tokens a step and process"))
    matrix_rate: float = field(default=0.02, metadata=_help("peak rate of Muon (warm-up, cosine to a tenth)"))
    learning_rate: float = field(default=2e-3, metadata=_help("peak rate of AdamW (embeddings, norms)"))
    weight_decay: float = field(default=0.02, metadata=_help("weight decay of matrices"))
    warmup_share: float = field(default=0.03, metadata=_help("share of the budget spent warming up"))
    tasks: str = field(default=TASK_MIX, metadata=_help("share of each task, as NAME=WEIGHT with commas between"))
    vocab_size: int = field(default=448, metadata=_help("tokens of a new tokenizer in all, added ones included"))
    hidden_size: int = field(default=192, metadata=_help("width"))
    num_layers: int = field(default=6, metadata=_help("depth"))
    num_heads: int = field(default=6, metadata=_help("query heads"))
    num_kv_heads: int = field(default=2, metadata=_help("key/value heads"))
    head_dim: int = field(default=32, metadata=_help("one of 32, 64, 96, 128 (what vLLM's CPU attention supports)"))
    ffn_size: int = field(default=576, metadata=_help("width of the feed-forward layers"))
    eval_questions: int = field(default=300, metadata=_help("held-out questions a task, one sample each"))
    save_steps: int = field(default=0, metadata=_help("steps between states to resume from (0: by minutes alone)"))
    save_minutes: float = field(default=5.0, metadata=_help("minutes between them; a kill costs no more"))

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


@dataclass(frozen=True, slots=True)
class SampledTurnsConfig:
    """Common settings of ``correct`` and ``imitate``, which sample trajectories and train on them.

    Neither paper has these stages: all defaults are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE | {"samples_file"}
    policy: Path = field(default=BUNDLED / "policy", metadata=_help("checkpoint to continue from"))
    output: Path = field(default=Path("runs/policy"), metadata=_help("where the checkpoint is written"))
    samples_file: Path | None = field(default=None, metadata=_help("file that keeps the sampled cycles"))
    seed: int = field(default=4, metadata=_help("seed of questions, sampling and training order"))
    tasks: str = field(default=TASK_MIX, metadata=_help("share of each task, as NAME=WEIGHT with commas between"))
    questions: int = field(default=8000, metadata=_help("training questions over all tasks"))
    samples: int = field(default=4, metadata=_help("trajectories a question"))
    max_cycles: int = field(default=2, metadata=_help("cycles a trajectory; forced open after wrong ones"))
    sampler: SamplerKind = field(default=SamplerKind.AUTO, metadata=_help("auto: vllm on GPUs, else transformers"))
    threads: int = field(default=1, metadata=_help("torch threads"))
    minutes: float = field(default=15.0, metadata=_help("wall-clock budget of the training loop"))
    max_steps: int = field(
        default=0, metadata=_help("train this many steps instead, however long they take (0: minutes)")
    )
    batch_tokens: int = field(default=4096, metadata=_help("padded tokens a step"))
    matrix_rate: float = field(default=0.003, metadata=_help("peak rate of Muon (warm-up, cosine to a tenth)"))
    learning_rate: float = field(default=1.5e-3, metadata=_help("peak rate of AdamW (embeddings, norms)"))
    warmup_share: float = field(default=0.05, metadata=_help("share of the budget spent warming up"))
    eval_questions: int = field(default=300, metadata=_help("held-out questions a task, one sample each"))
    save_steps: int = field(default=0, metadata=_help("steps between states to resume from (0: by minutes alone)"))
    save_minutes: float = field(default=5.0, metadata=_help("minutes between them; a kill costs no more"))

    def __post_init__(self) -> None:
        for name in ("max_cycles", "questions", "samples", "eval_questions", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        parse_mix(self.tasks)
        _check_loop(self)


@dataclass(frozen=True, slots=True)
class CorrectConfig(SampledTurnsConfig):
    """Train a policy to correct its own wrong cycles."""

    output: Path = field(default=Path("runs/corrected"), metadata=_help("where the checkpoint is written"))
    kept_share: float = field(default=0.5, metadata=_help("right trajectories per epoch, for each corrected one"))
    confirmed_share: float = field(
        default=0.15, metadata=_help("right trajectories with a confirming cycle per epoch, for each corrected one")
    )

    def __post_init__(self) -> None:
        SampledTurnsConfig.__post_init__(self)  # super() fails in a dataclass with slots
        if self.kept_share < 0 or self.confirmed_share < 0:
            raise ConfigError(f"kept_share={self.kept_share} and confirmed_share={self.confirmed_share} must be >= 0")


@dataclass(frozen=True, slots=True)
class ImitateConfig(SampledTurnsConfig):
    """Supervised learning on a teacher's right trajectories: a baseline of RLAD."""

    policy: Path = field(default=BUNDLED / "student", metadata=_help("student checkpoint to continue from"))
    teacher: Path = field(default=BUNDLED / "policy", metadata=_help("teacher checkpoint to sample from"))
    output: Path = field(default=Path("runs/imitated"), metadata=_help("where the student is written"))
    max_cycles: int = field(default=1, metadata=_help("cycles a trajectory; forced open after wrong ones"))


@dataclass(frozen=True, slots=True)
class ConfidenceConfig:
    """Training of a confidence generator from the policy's own trajectories.

    Defaults without a named source are ours, for 3 M parameters on two cores (deploy/models).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = _MAY_CHANGE | {"samples_file", "eval_samples"}
    policy: Path = field(default=BUNDLED / "policy", metadata=_help("checkpoint to sample and to start from"))
    output: Path = field(default=Path("runs/confidence"), metadata=_help("where the checkpoint is written"))
    samples_file: Path | None = field(default=None, metadata=_help("file that keeps the sampled cycles"))
    seed: int = field(default=2, metadata=_help("seed of questions, sampling and training order"))
    questions: int = field(default=2000, metadata=_help("training questions over all tasks"))
    samples: int = field(default=6, metadata=_help("trajectories a question. R-TAP: 128"))
    sampler: SamplerKind = field(default=SamplerKind.AUTO, metadata=_help("auto: vllm on GPUs, else transformers"))
    loss: Loss = field(default=Loss.BALANCED, metadata=_help("training loss. R-TAP eq. 6: balanced"))
    init: Init = field(default=Init.POLICY, metadata=_help("initial weights. R-TAP app. A: the policy's"))
    num_layers: int = field(default=0, metadata=_help("depth; the policy's first layers (0: all, as R-TAP app. A)"))
    max_cycles: int = field(default=3, metadata=_help("cycles a trajectory; forced open after wrong ones"))
    tasks: str = field(default=TASK_MIX, metadata=_help("share of each task, as NAME=WEIGHT with commas between"))
    synthetic_pairs: int = field(default=3, metadata=_help("synthetic right and hard wrong cycles a question"))
    validation_share: float = field(default=0.1, metadata=_help("questions kept for calibration and threshold"))
    fuse: bool = field(
        default=True, metadata=_help("combine the generator with the policy's log-probabilities when serving")
    )
    threads: int = field(default=1, metadata=_help("torch threads"))
    minutes: float = field(default=6.0, metadata=_help("wall-clock budget of the training loop"))
    max_steps: int = field(
        default=0, metadata=_help("train this many steps instead, however long they take (0: minutes)")
    )
    batch_tokens: int = field(default=4096, metadata=_help("padded tokens a step"))
    matrix_rate: float = field(default=0.002, metadata=_help("peak rate of Muon (warm-up, cosine to a tenth)"))
    learning_rate: float = field(default=1e-3, metadata=_help("peak rate of AdamW (embeddings, head, norms)"))
    weight_decay: float = field(default=0.02, metadata=_help("weight decay of matrices"))
    global_weight: float = field(default=0.25, metadata=_help("weight of questions all right or all wrong"))
    warmup_share: float = field(default=0.03, metadata=_help("share of the budget spent warming up"))
    eval_questions: int = field(default=500, metadata=_help("held-out questions a task"))
    eval_samples: int = field(default=8, metadata=_help("trajectories a held-out question"))
    save_steps: int = field(default=0, metadata=_help("steps between states to resume from (0: by minutes alone)"))
    save_minutes: float = field(default=5.0, metadata=_help("minutes between them; a kill costs no more"))

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} must be at least 2: a single answer has no contrast")
        for name in ("max_cycles", "questions", "eval_questions", "eval_samples", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
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


def _check_loop(config: SftConfig | SampledTurnsConfig | ConfidenceConfig) -> None:
    if config.minutes <= 0 or config.save_minutes <= 0 or config.batch_tokens < 256:
        raise ConfigError(
            f"minutes={config.minutes} and save_minutes={config.save_minutes} must be positive, and "
            f"batch_tokens={config.batch_tokens} at least 256"
        )
    if config.max_steps < 0 or config.save_steps < 0:
        raise ConfigError(f"max_steps={config.max_steps} and save_steps={config.save_steps} must not be negative")
    if not 0 < config.warmup_share < 1:
        raise ConfigError(f"warmup_share={config.warmup_share} must be between 0 and 1")


Config = TypeVar("Config", bound="DataclassInstance")


def run_dir(output: Path) -> Path:
    """Folder of logs and resumable states of the run that writes ``output``."""
    return output.with_name(f"{output.name}.run")


def add_flags(parser: argparse.ArgumentParser, config: "type[DataclassInstance]") -> None:
    """Add one flag per field, and ``--config``."""
    parser.add_argument("--config", type=Path, help="YAML file with the same names as the flags; flags win")
    types = get_type_hints(config)
    for item in fields(config):
        kind = _plain(types[item.name])
        shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if issubclass(kind, StrEnum):
            shape["choices"] = list(kind)
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {item.default})".replace("%", "%%"),
            **shape,
        )


def _plain(kind: Any) -> type:
    """The type without ``None``."""
    return next(k for k in get_args(kind) if k is not type(None)) if get_args(kind) else kind


def build_config(config: type[Config], file: Path | None, flags: dict[str, Any]) -> Config:
    """Merge defaults, ``file`` and ``flags``. Raises ConfigError for unknown keys and wrong types."""
    hints = get_type_hints(config)
    types = {item.name: hints[item.name] for item in fields(config)}
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


def _coerce(name: str, value: Any, declared: Any) -> Any:
    kind = _plain(declared)
    if value is None and kind is not declared:
        return None
    try:
        if isinstance(value, str) and (kind is float or issubclass(kind, Path | StrEnum)):  # YAML reads 1e-6 as text
            return kind(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}") from error
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
    return value
