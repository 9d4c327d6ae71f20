"""Reward functions in TRL's form; formulas are in ``rewards.py``."""

from collections.abc import Callable
from typing import Any

from rtap_training import rewards
from rtap_training.config.rl import RlConfig
from rtap_training.rl.rollouts import Dialect, Rollout

RewardFunction = Callable[..., list[float]]


def reward_functions(config: RlConfig, dialect: Dialect) -> list[RewardFunction]:
    """The configured rewards: TRL passes dataset columns as keywords and expects one value per row."""

    def increase(*, confidences: list[list[float]], **_: Any) -> list[float]:
        return [rewards.confidence_increase(row) for row in confidences]

    def final(*, confidences: list[list[float]], **_: Any) -> list[float]:
        return [rewards.confidence_final(row, config.threshold) for row in confidences]

    def format(*, rollout: list[Rollout], **_: Any) -> list[float]:
        return [rewards.well_formed([c.text for c in r.cycles], dialect.format) for r in rollout]

    def answer(*, rollout: list[Rollout], **_: Any) -> list[float]:
        return [rewards.answer_reward(r.is_right) for r in rollout]

    def length(*, rollout: list[Rollout], **_: Any) -> list[float]:
        limits = {"max_tokens": config.max_tokens, "cache_tokens": config.length_cache}
        return [rewards.length_penalty(len(r.completion_ids), **limits) for r in rollout]

    known: dict[str, RewardFunction] = {f.__name__: f for f in (increase, final, format, answer, length)}
    return [known[name] for name in config.reward_names]
