"""Per-token objective of a method on a TRL batch; formulas are in ``losses.py``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rtap_training.config.rl import Method, RatioLevel, RlConfig
from rtap_training.losses import (
    by_token,
    clipped_surrogate,
    is_clipped,
    kdrl_weight,
    kl_k2,
    kl_k3,
    sequence_log_ratio,
    trrd_log_ratio,
)


def needs_teacher(config: RlConfig, advantages: Tensor, mask: Tensor) -> Tensor:
    """Rows (bool, (B,)) whose objective depends on the teacher. mask (B, T): tokens that are trained.

    All rows under KDRL. Under RLAD a token without advantage has loss and gradient 0 for any teacher.
    """
    if config.method is Method.KDRL:
        return torch.ones_like(mask[:, 0], dtype=torch.bool)
    return ((by_token(advantages) != 0) & mask.bool()).any(dim=1)


def objective(
    config: RlConfig, logp: Tensor, inputs: Mapping[str, Tensor], mask: Tensor, *, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(clipped surrogate plus KL terms, metrics to log), all (B, T). mask (B, T): tokens that are trained.

    The teacher's log-probabilities, and its metrics, are NaN in rows that it did not score.
    """
    old = inputs.get("old_per_token_logps")  # TRL omits it when a generation is used for one update
    log_ratio = _log_ratio(config, logp, logp.detach() if old is None else old, inputs)
    if config.ratio is RatioLevel.SEQUENCE:
        sampled = mask * ~inputs["is_boundary"] if "is_boundary" in inputs else mask
        log_ratio = sequence_log_ratio(log_ratio, sampled)
    advantages, clip = inputs["advantages"], {"clip_low": config.clip_low, "clip_high": config.clip_high}
    per_token = clipped_surrogate(log_ratio, advantages, **clip)
    if "importance_sampling_ratio" in inputs:
        per_token = per_token * inputs["importance_sampling_ratio"]
    metrics = {
        "clip_ratio/region_mean": is_clipped(log_ratio, advantages, **clip),
        "kl_old": kl_k3(logp.detach(), logp.detach() if old is None else old),
    }
    if config.method is Method.KDRL:
        distance = kl_k2(logp, inputs["teacher_per_token_logps"])
        weight = kdrl_weight(step, start=config.kdrl_start, end=config.kdrl_end, decay=config.kdrl_decay)
        per_token = per_token + weight * distance
        metrics["kl_teacher"] = distance
    if config.beta > 0:
        distance = kl_k3(logp, inputs["ref_per_token_logps"])
        per_token = per_token + config.beta * distance
        metrics["kl"] = distance
    if "teacher_per_token_logps" in inputs:
        gap = logp - inputs["teacher_per_token_logps"]
        is_clamped = (gap.abs() > config.teacher_clamp).to(gap.dtype)
        metrics |= {"teacher/log_ratio": gap, "teacher/clamped": torch.where(gap.isnan(), gap, is_clamped)}
    return per_token, metrics


def _log_ratio(config: RlConfig, logp: Tensor, old: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    if config.method is not Method.RLAD:
        return logp - old
    return trrd_log_ratio(
        logp,
        old,
        inputs["teacher_per_token_logps"].nan_to_num(0.0),  # rows without advantage: any finite value
        alpha=config.alpha,
        teacher_clamp=config.teacher_clamp,
        clamp_gradient=config.clamp_gradient.value,
    )
