"""TRRD as a policy loss for verl 0.9. Importing this module registers it.

verl passes a teacher's log-probabilities to distillation losses only, which it calls first on each micro batch. So two
functions are registered as ``trrd``: a distillation loss that is zero and keeps the teacher's log-probabilities, and
the policy loss that uses them. ``rlad.sh`` launches a run; ``dataset_and_reward.py`` has questions and rewards.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rtap_training.losses import clipped_surrogate, is_clipped, trrd_log_ratio
from rtap_training.training_errors import TeacherError

NAME = "trrd"


@dataclass(frozen=True, slots=True)
class Teacher:
    """Teacher log-probabilities of one micro batch (B, T), and the TRRD settings."""

    logp: Tensor
    alpha: float
    clamp: float | None


_kept: ContextVar[Teacher | None] = ContextVar("trrd_teacher", default=None)


def keep_teacher(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """verl's distillation loss: keeps the teacher's log-probabilities and returns zeros (B, T).

    The loss is zero, so its weight ``distillation_loss_coef`` carries the teacher's share of the anchor, 1 - alpha.
    ``loss_max_clamp`` is the bound of the teacher's log-ratio.
    """
    del config, model_output
    logp: Tensor = _verl("workers.utils.padding").no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    settings = distillation_config.distillation_loss
    _kept.set(Teacher(logp, 1 - float(settings.distillation_loss_coef), settings.loss_max_clamp))
    return torch.zeros_like(logp), {}


def trrd_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss: RLAD eq. 4 under ``loss_agg_mode`` seq-mean-token-mean; all tensors (B, T).

    Raises TeacherError if the teacher has not scored this micro batch.
    """
    teacher = _kept.get()
    _kept.set(None)
    if teacher is None or teacher.logp.shape != log_prob.shape:
        raise TeacherError(
            "the policy loss trrd needs the teacher's scores of the same micro batch; set distillation.enabled=true "
            "and distillation.distillation_loss.loss_mode=trrd"
        )
    log_ratio = trrd_log_ratio(log_prob, old_log_prob, teacher.logp, alpha=teacher.alpha, teacher_clamp=teacher.clamp)
    clip = {
        "clip_low": _first(config.clip_ratio_low, config.clip_ratio),
        "clip_high": _first(config.clip_ratio_high, config.clip_ratio),
    }
    per_token = clipped_surrogate(log_ratio, advantages, **clip)
    if rollout_is_weights is not None:
        per_token = per_token * rollout_is_weights
    loss: Tensor = _verl("trainer.ppo.core_algos").agg_loss(
        loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    mask = response_mask.float()
    gap = (log_prob - teacher.logp).detach()
    figures = {
        "actor/pg_clipfrac": is_clipped(log_ratio, advantages, **clip),
        "actor/ppo_kl": (old_log_prob - log_prob).detach(),
        "actor/teacher_log_ratio": gap,
        "actor/teacher_clamped": gap.abs() > (teacher.clamp if teacher.clamp is not None else torch.inf),
    }
    return loss, {name: ((value * mask).sum() / mask.sum().clamp(min=1)).item() for name, value in figures.items()}


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def register() -> None:
    """Register both functions with verl."""
    distillation = _verl("trainer.distillation.losses")
    settings = distillation.DistillationLossSettings(names=[NAME], use_estimator=True)
    distillation.register_distillation_loss(settings)(keep_teacher)
    _verl("trainer.ppo.core_algos").register_policy_loss(NAME)(trrd_policy_loss)


def _verl(module: str) -> Any:
    """Import a module of verl, whose pinned dependencies exclude this project's; CI does not install it."""
    return import_module(f"verl.{module}")


if find_spec("verl") is not None:
    register()
