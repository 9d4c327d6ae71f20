"""Reinforcement-learning objectives: GRPO, TRRD (RLAD, arXiv 2602.22495) and the KL terms of the baselines.

Pure functions of tensors. By default log-probabilities and masks are (B, T) over the sampled completion tokens,
advantages (B,) or (B, T), and results scalars to minimise.
"""

from typing import Literal

import torch
from torch import Tensor

ClampGradient = Literal["stop", "straight_through"]
"""Gradient through the clamp of the teacher's log-ratio, which the paper does not specify.

stop: as torch.clamp, zero outside the range. straight_through: as without a clamp.
"""


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(reward - mean) / std within each group of ``group_size`` consecutive rewards, population std (RLAD eq. 1).

    rewards, result: (N,). A group with equal rewards gets zeros. Raises ValueError if N is not a multiple of
    ``group_size``.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards cannot be split into groups of {group_size}")
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    is_flat = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(is_flat, 0.0, centred / torch.where(is_flat, 1.0, spread)).reshape(rewards.shape)


def advantage_shares(rewards: Tensor, group_size: int) -> Tensor:
    """Share of each reward (K,) in the advantages of their sum; rewards: (N, K).

    The covariance of a reward with the sum, over the variance of the sum: the shares of a group add up to 1, and a
    reward that works against the others has a negative one. Mean over the groups with contrast; NaN without any.
    """
    groups = rewards.reshape(-1, group_size, rewards.size(1))
    centred = groups - groups.mean(dim=1, keepdim=True)
    total = centred.sum(dim=2, keepdim=True)
    shares = (centred * total).mean(dim=1) / total.square().mean(dim=1)
    total_rewards = groups.sum(dim=2)
    return shares[total_rewards.amax(dim=1) > total_rewards.amin(dim=1)].mean(dim=0)


MAX_LOG_RATIO = 20.0
"""Bound of a sequence's log-ratio, whose exponential would overflow."""


def sequence_log_ratio(log_ratio: Tensor, sampled: Tensor) -> Tensor:
    """log pi(O) / old(O) of each whole sequence, at each of its sampled tokens: R-TAP's ratio (sec. 3.3).

    sampled (B, T): 1 for tokens that the policy sampled. Other tokens keep a ratio of their own."""
    total = (log_ratio * sampled).sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(sampled.bool(), total, log_ratio)


def trrd_log_ratio(
    logp: Tensor,
    logp_old: Tensor,
    logp_teacher: Tensor,
    *,
    alpha: float = 0.5,
    teacher_clamp: float | None = 1.0,
    clamp_gradient: ClampGradient = "stop",
) -> Tensor:
    """alpha (log pi - log old) + (1 - alpha) clamp(log pi - log teacher): RLAD eq. 5 with the clamp of appendix B.

    The anchor old^alpha teacher^(1-alpha) is a geometric mixture of the sampled token's probabilities and is not
    renormalised. teacher_clamp: bound of the teacher's term in nats; None for no bound.
    """
    to_teacher = logp - logp_teacher
    if teacher_clamp is not None:
        clamped = to_teacher.clamp(-teacher_clamp, teacher_clamp)
        if clamp_gradient == "straight_through":
            clamped = logp + (clamped - logp).detach()
        to_teacher = clamped
    return alpha * (logp - logp_old) + (1 - alpha) * to_teacher


def by_token(advantages: Tensor) -> Tensor:
    """Advantages as (B, T), or as (B, 1) where those of a row are equal."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) for each token, (B, T)."""
    per_token = by_token(advantages)
    ratio = log_ratio.exp()
    return -torch.min(ratio * per_token, ratio.clamp(1 - clip_low, 1 + clip_high) * per_token)


def is_clipped(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Tokens with a flat surrogate (bool, (B, T)). With a teacher there are some from the first update on (RLAD)."""
    per_token = by_token(advantages)
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip_high) & (per_token > 0)) | ((ratio < 1 - clip_low) & (per_token < 0))


def sequence_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of the mean over their tokens (RLAD eq. 1, eq. 4). A row without tokens counts as 0."""
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def grpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """The clipped GRPO surrogate, sequence mean of token means, without a KL term (RLAD eq. 1)."""
    return sequence_mean(clipped_surrogate(logp - logp_old, advantages, clip_low=clip_low, clip_high=clip_high), mask)


def trrd_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_teacher: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_clamp: float | None = 1.0,
    clamp_gradient: ClampGradient = "stop",
) -> Tensor:
    """RLAD eq. 4: the GRPO surrogate on the TRRD ratio. ``alpha`` = 1 is ``grpo_loss`` to the last bit."""
    log_ratio = trrd_log_ratio(
        logp, logp_old, logp_teacher, alpha=alpha, teacher_clamp=teacher_clamp, clamp_gradient=clamp_gradient
    )
    return sequence_mean(clipped_surrogate(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high), mask)


def kl_k2(logp: Tensor, logp_other: Tensor) -> Tensor:
    """(log other - log pi)^2 / 2 for each token: KDRL's estimator of KL(pi || other), unbiased in its gradient."""
    return (logp_other - logp).square() / 2


def kl_k3(logp: Tensor, logp_other: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log other - log pi for each token: GRPO's estimator of KL(pi || other), at least 0."""
    difference = logp_other - logp
    return difference.exp() - difference - 1


def kdrl_weight(step: int, *, start: float = 5e-3, end: float = 1e-3, decay: float = 5e-5) -> float:
    """KDRL's weight of the teacher's KL after ``step`` updates: linear from ``start`` down to ``end`` (2506.02208)."""
    return max(end, start - decay * step)
