"""Rows that do not depend on the teacher: loss and gradient are the same with and without its scores."""

import pytest
import torch
from torch import Tensor

from rtap_training.config.rl import ClampGradient, KdrlConfig, RladConfig, RlConfig
from rtap_training.losses import sequence_mean
from rtap_training.rl.objective import needs_teacher, objective

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
BY_ROW = torch.tensor([1.5, 0.0, -0.5, 0.0])
BY_TOKEN = torch.tensor([[1.5] * 4, [0.0, 0.0, 0.0, 2.0], [-0.5] * 4, [0.0, 1.0, 0.0, 0.0]])  # row 1: in the padding


def batch(advantages: Tensor) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    logps = {
        name: -3 * torch.rand(4, 4, generator=random)
        for name in ("old_per_token_logps", "teacher_per_token_logps", "ref_per_token_logps")
    }
    return logps | {"advantages": advantages, "importance_sampling_ratio": torch.full((4, 4), 0.7)}


def update(config: RlConfig, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, gradient, metrics)"""
    logp = (inputs["old_per_token_logps"] - 0.2).requires_grad_()
    per_token, metrics = objective(config, logp, inputs, MASK, step=0)
    loss = sequence_mean(per_token, MASK)
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad, metrics


@pytest.mark.parametrize(("advantages", "needed"), [(BY_ROW, [0, 2]), (BY_TOKEN, [0, 2, 3])])
@pytest.mark.parametrize("clamp_gradient", list(ClampGradient))
@pytest.mark.parametrize("teacher_clamp", [1.0, float("inf")])
def test_rlad_needs_no_score_of_a_row_without_advantage(
    advantages: Tensor, needed: list[int], clamp_gradient: ClampGradient, teacher_clamp: float
) -> None:
    config = RladConfig(teacher="t", beta=0.1, clamp_gradient=clamp_gradient, teacher_clamp=teacher_clamp)
    inputs = batch(advantages)
    rows = needs_teacher(config, advantages, MASK)
    assert rows.nonzero()[:, 0].tolist() == needed
    loss, gradient, metrics = update(config, inputs)
    scored = torch.where(rows[:, None], inputs["teacher_per_token_logps"], torch.nan)
    same_loss, same_gradient, some_metrics = update(config, inputs | {"teacher_per_token_logps": scored})
    assert same_loss.equal(loss)
    assert same_gradient.equal(gradient)
    for name in ("teacher/log_ratio", "teacher/clamped"):
        assert some_metrics[name].isnan().all(dim=1).tolist() == (~rows).tolist()
        assert some_metrics[name][rows].equal(metrics[name][rows])
    moved = torch.where(rows[:, None], inputs["teacher_per_token_logps"] - 0.1, torch.nan)
    assert not update(config, inputs | {"teacher_per_token_logps": moved})[0].equal(loss)


def test_kdrl_needs_a_score_of_every_row() -> None:
    config, inputs = KdrlConfig(teacher="t"), batch(BY_ROW)
    assert needs_teacher(config, BY_ROW, MASK).all()
    moved = inputs["teacher_per_token_logps"].clone()
    moved[1] -= 0.1
    assert not update(config, inputs | {"teacher_per_token_logps": moved})[1].equal(update(config, inputs)[1])
