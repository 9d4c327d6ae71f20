"""Configs of ``rtap train {rtap, grpo, rlad, kdrl}``: shared fields, defaults per method, each with its source.

Defaults are the papers' values, for models of billions of parameters. The recipe of the small bundled models
(training/rtap_training/bundled/recipe.yaml) overrides them.
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from rtap_core.errors import ConfigError
from rtap_training.config.settings import BUNDLED, TEMPLATE_KWARGS, run_dir, setting, template_kwargs
from rtap_training.evaluation.question_files import check_prompt

REWARDS = ("increase", "final", "format", "answer", "length")
OUTPUT_HELP = "checkpoint to write; logs and checkpoints of the run are in OUTPUT.run"


class Method(StrEnum):
    """Objective of a run."""

    RTAP = "rtap"
    GRPO = "grpo"
    RLAD = "rlad"
    KDRL = "kdrl"


class RatioLevel(StrEnum):
    """Unit of the clipped ratio: each token (RLAD eq. 1), or the whole sequence (R-TAP sec. 3.3)."""

    TOKEN = "token"  # noqa: S105  # not a password
    SEQUENCE = "sequence"


class ClampGradient(StrEnum):
    """Gradient through the clamp of the teacher's log-ratio (see ``rtap_training.losses``)."""

    STOP = "stop"
    STRAIGHT_THROUGH = "straight_through"


@dataclass(frozen=True, slots=True)
class RlConfig:
    """Fields of every method. ``Ours``: neither paper states a value."""

    method: ClassVar[Method] = Method.GRPO
    policy: str = setting(str(BUNDLED / "policy"), "checkpoint to train: a folder or a Hugging Face name")
    lora_rank: int = setting(0, "train LoRA adapters of this rank on a frozen model; 0: all weights. Ours")
    merge: bool = setting(False, "with lora_rank: write a whole checkpoint instead of an adapter")
    output: Path = setting(Path("runs/rl"), OUTPUT_HELP)
    questions: str = setting("countdown", "task, mix (countdown=0.5,knights=0.5), JSONL file, rg:NAME, or hf:NAME")
    prompt: str = setting("", "message with {question} in it; empty: the question, for rg: also to answer in a box")
    system_prompt: str = setting("", "system message before it. R-TAP app. B1 has one")
    chat_template_kwargs: str = setting("{}", TEMPLATE_KWARGS)
    num_questions: int = setting(4096, "distinct training questions to draw. Ours")
    confidence: Path | None = setting(None, "confidence generator; required by the rewards increase and final")
    confidence_output: Path | None = setting(None, "where to save the updated generator; default: OUTPUT-confidence")
    teacher: str | None = setting(None, "checkpoint, or http:// address of a vLLM server, that scores the rollouts")
    rewards: str = setting("format,answer", "rewards summed with weight one. GRPO: answer and format (Open-R1)")
    threshold: float = setting(0.55, "confidence that the last cycle must reach. R-TAP sec. 3.3")
    max_cycles: int = setting(1, "cycles a rollout may have (T)")
    boundary_advantage: float = setting(
        0.0, "advantage of the tokens between cycles, set by the cut; 0 masks them. Ours"
    )
    group_size: int = setting(8, "rollouts a question (G). RLAD sec. 4")
    questions_per_step: int = setting(32, "questions a generation. RLAD: 256 sequences / 8 a group")
    micro_batch: int = setting(32, "sequences a forward pass. RLAD: 32 (logic)")
    num_iterations: int = setting(1, "updates a generation (mu)")
    max_steps: int = setting(1000, "updates in all. Ours")
    learning_rate: float = setting(1e-6, "constant rate of AdamW; about 1e-5 with lora_rank. RLAD and R-TAP: 1e-6")
    clip_low: float = setting(0.2, "lower clip of the ratio. Both papers")
    clip_high: float = setting(0.28, "upper clip of the ratio. RLAD sec. 4")
    ratio: RatioLevel = setting(
        RatioLevel.TOKEN, "ratio that is clipped: of each token, or of the sequence. RLAD: token"
    )
    beta: float = setting(0.0, "weight of the KL to the starting policy. RLAD does not state it")
    alpha: float = setting(0.5, "share of the old policy in the TRRD anchor. RLAD sec. 4; 1 is GRPO")
    teacher_clamp: float = setting(1.0, "bound of the teacher's log-ratio in nats; inf: none. RLAD app. B")
    clamp_gradient: ClampGradient = setting(
        ClampGradient.STOP, "gradient outside that bound: stop or straight_through. Ours"
    )
    kdrl_start: float = setting(5e-3, "first weight of the teacher's KL. KDRL (2506.02208)")
    kdrl_end: float = setting(1e-3, "last weight of the teacher's KL. KDRL")
    kdrl_decay: float = setting(5e-5, "decrease of that weight an update. KDRL")
    max_tokens: int = setting(2048, "tokens a rollout. RLAD: responses of 2,048")
    length_cache: int = setting(256, "token range below max_tokens in which the length penalty grows. Ours")
    max_cycle_tokens: int = setting(0, "maximum tokens per cycle; 0: only max_tokens applies. Ours")
    temperature: float = setting(1.0, "sampling temperature. R-TAP app. A")
    top_p: float = setting(1.0, "nucleus. 1: the ratio is over the whole vocabulary")
    top_k: int = setting(0, "largest tokens to sample from; 0: all")
    repetition_penalty: float = setting(1.0, "penalty of repeated tokens; 1: none")
    generator_rate: float = setting(1e-6, "rate of the generator's AdamW during RL. R-TAP app. A")
    generator_iterations: int = setting(12, "generator updates a generation, before the policy's. R-TAP alg. 1: mu")
    generator_global_weight: float = setting(
        0.0, "weight of questions without contrast, where eq. 6 is undefined. Ours"
    )
    seed: int = setting(1, "seed of questions, order and sampling")
    threads: int = setting(1, "torch threads; use more only on idle cores")
    save_steps: int = setting(100, "updates between checkpoints; a whole number of generations")
    logging_steps: int = setting(1, "updates between log lines")
    vllm: str = setting("none", "rollouts on vLLM: none, colocate, or the http:// address of TRL's server. Ours")
    bf16: bool = setting(False, "compute in bfloat16; with lora_rank the frozen weights are kept in it too")
    gradient_checkpointing: bool = setting(False, "recompute activations (large models)")

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.prompt:
            check_prompt("prompt=", self.prompt)
        _ = self.template_kwargs
        unknown = sorted(set(self.reward_names) - set(REWARDS))
        if unknown or not self.reward_names:
            raise ConfigError(f"rewards={self.rewards!r} must list some of {', '.join(REWARDS)}")
        if self.confidence is None and {"increase", "final"} & set(self.reward_names):
            raise ConfigError("the rewards increase and final need --confidence, a generator that scores cycles")
        reads_teacher = self.method in (Method.RLAD, Method.KDRL)
        if reads_teacher and self.teacher is None:
            raise ConfigError(f"{self.method} needs --teacher, a model that scores the student's rollouts")
        if not reads_teacher and self.teacher is not None:
            raise ConfigError(
                f"{self.method} does not use a teacher: leave out --teacher {self.teacher}, or train rlad or kdrl"
            )
        if self.method is Method.RLAD and self.ratio is RatioLevel.SEQUENCE:
            raise ConfigError("ratio=sequence does not work with rlad, whose ratio is of each token (eq. 5)")
        if self.merge and not self.lora_rank:
            raise ConfigError("merge=True needs a lora_rank: without adapters the output is a whole checkpoint")
        if self.save_steps % self.num_iterations:
            raise ConfigError(
                f"save_steps={self.save_steps} must be a multiple of num_iterations={self.num_iterations}: a "
                "checkpoint between the updates of one generation would resume with different rollouts"
            )
        if self.generation_rows % self.micro_batch and self.generation_rows > self.micro_batch:
            raise ConfigError(
                f"micro_batch={self.micro_batch} must divide group_size*questions_per_step={self.generation_rows}"
            )
        is_truncated = self.top_p < 1 or self.top_k > 0 or self.repetition_penalty != 1
        if self.vllm != "none" and is_truncated:
            raise ConfigError(
                f"vllm={self.vllm} needs top_p=1, top_k=0 and repetition_penalty=1: other values change the sampler's "
                "probabilities but not the trainer's, which makes the importance correction wrong"
            )

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The rewards in use."""
        return tuple(name.strip() for name in self.rewards.split(",") if name.strip())

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template. Raises ConfigError."""
        return template_kwargs(self.chat_template_kwargs)

    @property
    def generation_rows(self) -> int:
        """Sequences per generation."""
        return self.group_size * self.questions_per_step

    @property
    def run_dir(self) -> Path:
        """Folder of checkpoints and logs of the run."""
        return run_dir(self.output)


def _check_ranges(config: RlConfig) -> None:
    positive = ("num_questions", "max_cycles", "questions_per_step", "micro_batch", "num_iterations", "max_steps",
                "learning_rate", "max_tokens", "temperature", "threads", "save_steps", "logging_steps",
                "teacher_clamp", "generator_rate", "repetition_penalty")  # fmt: skip
    for name in positive:
        if not getattr(config, name) > 0:  # nor NaN
            raise ConfigError(f"{name}={getattr(config, name)} must be positive")
    finite = ("clip_high", "beta", "kdrl_start", "kdrl_end", "kdrl_decay", "generator_iterations", "boundary_advantage",
              "top_k", "max_cycle_tokens", "lora_rank")  # fmt: skip
    for name in finite:
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name}={getattr(config, name)} must be a number of at least 0")
    if config.kdrl_end > config.kdrl_start:
        raise ConfigError(f"kdrl_end={config.kdrl_end} must not be above kdrl_start={config.kdrl_start}")
    for name in ("threshold", "alpha", "top_p", "clip_low", "generator_global_weight"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be in [0, 1]")
    if config.group_size < 2:
        raise ConfigError(f"group_size={config.group_size} must be at least 2: a single rollout has no advantage")
    if not 0 < config.length_cache <= config.max_tokens:
        raise ConfigError(f"length_cache={config.length_cache} must be in 1..max_tokens={config.max_tokens}")


@dataclass(frozen=True, slots=True)
class RtapConfig(RlConfig):
    """R-TAP's reinforcement learning (arXiv 2603.02099, sec. 3.3 and app. A)."""

    method: ClassVar[Method] = Method.RTAP
    output: Path = setting(Path("runs/rtap"), OUTPUT_HELP)
    confidence: Path | None = setting(BUNDLED / "confidence", "confidence generator of the confidence rewards")
    rewards: str = setting("increase,final,format,answer,length", "rewards summed with weight one. R-TAP sec. 3.3")
    max_cycles: int = setting(4, "cycles a rollout may have (T). R-TAP: 4")
    boundary_advantage: float = setting(
        1.0, "advantage of the tokens between cycles, set by the cut; 0 masks them. Ours"
    )
    group_size: int = setting(12, "rollouts a question (G). R-TAP: 12")
    questions_per_step: int = setting(8, "questions a generation. R-TAP does not state it")
    micro_batch: int = setting(24, "sequences a forward pass. Ours")
    num_iterations: int = setting(12, "updates a generation (mu). R-TAP: 12")
    clip_high: float = setting(0.2, "upper clip of the ratio. R-TAP: 0.2 on both sides")
    ratio: RatioLevel = setting(
        RatioLevel.SEQUENCE, "ratio that is clipped: of each token, or of the sequence. R-TAP: sequence"
    )
    beta: float = setting(0.04, "weight of the KL to the starting policy. R-TAP: 0.04")
    save_steps: int = setting(120, "updates between checkpoints; a whole number of generations")
    top_p: float = setting(0.95, "nucleus. R-TAP: .95")
    top_k: int = setting(50, "largest tokens to sample from. R-TAP: 50")
    repetition_penalty: float = setting(1.05, "penalty of repeated tokens. R-TAP: 1.05")


@dataclass(frozen=True, slots=True)
class GrpoConfig(RlConfig):
    """GRPO with answer and format rewards: the baseline of both papers (RLAD eq. 1)."""

    method: ClassVar[Method] = Method.GRPO
    output: Path = setting(Path("runs/grpo"), OUTPUT_HELP)


@dataclass(frozen=True, slots=True)
class RladConfig(RlConfig):
    """RLAD: GRPO with the ratio anchored on teacher and old policy (arXiv 2602.22495)."""

    method: ClassVar[Method] = Method.RLAD
    output: Path = setting(Path("runs/rlad"), OUTPUT_HELP)


@dataclass(frozen=True, slots=True)
class KdrlConfig(RlConfig):
    """KDRL: GRPO minus an annealed KL to the teacher (arXiv 2506.02208), RLAD's main baseline."""

    method: ClassVar[Method] = Method.KDRL
    output: Path = setting(Path("runs/kdrl"), OUTPUT_HELP)


CONFIGS: dict[str, type[RlConfig]] = {
    "rtap": RtapConfig, "grpo": GrpoConfig, "rlad": RladConfig, "kdrl": KdrlConfig,
}  # fmt: skip
_MAY_CHANGE = ("threads", "logging_steps", "max_steps", "merge")
SAME_RUN = ("method", *(f.name for f in fields(RlConfig) if f.name not in _MAY_CHANGE))
"""Fields that must not change when a run is resumed."""
