"""RL objectives: identities and derived values from the papers."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rtap_training.losses import (
    advantage_shares,
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    is_clipped,
    kdrl_weight,
    kl_k2,
    kl_k3,
    sequence_log_ratio,
    sequence_mean,
    trrd_log_ratio,
    trrd_loss,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def batch(seed: int = 0, rows: int = 6, width: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, width)
    logp = -torch.rand(shape, generator=generator) * 3
    return {
        "logp": logp,
        "logp_old": logp + 0.3 * torch.randn(shape, generator=generator),
        "logp_teacher": logp + torch.randn(shape, generator=generator),
        "advantages": torch.randn(rows, generator=generator),
        "mask": (torch.rand(shape, generator=generator) > 0.3).float(),
    }


def gradient(name: str, values: dict[str, Tensor], **settings: float | str) -> Tensor:
    logp = values["logp"].clone().requires_grad_()
    loss = {"trrd": trrd_loss, "grpo": grpo_loss}[name]
    arguments = {k: v for k, v in values.items() if name == "trrd" or k != "logp_teacher"}
    loss(**(arguments | {"logp": logp}), **settings).backward()
    assert logp.grad is not None
    return logp.grad


@pytest.mark.parametrize("seed", range(5))
def test_alpha_one_is_grpo_to_the_last_bit(seed: int) -> None:
    values = batch(seed)
    without_teacher = {k: v for k, v in values.items() if k != "logp_teacher"}
    assert trrd_loss(**values, alpha=1.0).equal(grpo_loss(**without_teacher))
    assert gradient("trrd", values, alpha=1.0).equal(gradient("grpo", values))


@pytest.mark.parametrize("seed", range(3))
def test_an_infinite_clamp_is_eq_5_without_one(seed: int) -> None:
    values = batch(seed)
    logps = values["logp"], values["logp_old"], values["logp_teacher"]
    assert trrd_log_ratio(*logps, teacher_clamp=math.inf).equal(trrd_log_ratio(*logps, teacher_clamp=None))


def test_the_ratio_of_a_sequence_is_the_product_over_its_sampled_tokens() -> None:
    """The last token of the first row was set by the loop: it keeps its own ratio, and its own advantage."""
    log_ratio = torch.tensor([[0.1, 0.2, 5.0], [-0.3, 0.1, 0.1]])
    sampled = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    whole = sequence_log_ratio(log_ratio, sampled)
    assert whole[0].tolist() == pytest.approx([0.3, 0.3, 5.0])
    assert whole[1].tolist() == pytest.approx([-0.1] * 3)
    loss = sequence_mean(clipped_surrogate(whole, torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.2), sampled)
    assert loss.item() == pytest.approx((-1.2 + math.exp(-0.1)) / 2)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_the_ratio_of_a_long_sequence_does_not_overflow(advantage: float) -> None:
    whole = sequence_log_ratio(torch.full((1, 300), 0.5), torch.ones(1, 300))
    assert clipped_surrogate(whole, torch.tensor([advantage]), clip_low=0.2, clip_high=0.2).isfinite().all()


def test_shares_of_the_advantage_add_up_and_show_what_decides() -> None:
    answer = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    length = torch.tensor([-0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    constant = torch.ones(6)
    shares = advantage_shares(torch.stack([answer, length, constant], dim=1), 2)  # the last group has no contrast
    assert shares.tolist() == pytest.approx([2.0, -1.0, 0.0])
    assert advantage_shares(torch.ones(4, 2), 2).isnan().all()


@given(st.floats(0, 1), st.integers(0, 1000))
def test_teacher_equal_to_old_gives_grpos_ratio_for_every_alpha(alpha: float, seed: int) -> None:
    values = batch(seed)
    ratio = trrd_log_ratio(values["logp"], values["logp_old"], values["logp_old"], alpha=alpha, teacher_clamp=None)
    torch.testing.assert_close(ratio, values["logp"] - values["logp_old"])


def test_zero_advantage_gives_zero_loss_and_no_gradient() -> None:
    values = batch() | {"advantages": torch.zeros(6)}
    assert trrd_loss(**values).item() == 0
    assert not gradient("trrd", values).any()


def test_masked_tokens_get_no_gradient() -> None:
    values = batch()
    assert not gradient("trrd", values)[values["mask"] == 0].any()


def test_another_teacher_gives_another_gradient() -> None:
    values = batch()
    other = values | {"logp_teacher": values["logp_teacher"] - 0.5}
    assert not gradient("trrd", values).equal(gradient("trrd", other))


@pytest.mark.parametrize(("advantage", "bound"), [(1.0, 2 * math.log(1.28)), (-1.0, 2 * math.log(0.8))])
def test_first_update_masks_beyond_the_derived_difference(advantage: float, bound: float) -> None:
    """At pi = old and alpha = 1/2 the ratio is exp(d/2): A > 0 is flat above d = 0.494, A < 0 below -0.446."""
    assert bound == pytest.approx(0.494 if advantage > 0 else -0.446, abs=5e-4)
    differences = torch.tensor([[bound - 1e-3, bound + 1e-3]])
    old = torch.full((1, 2), -1.0)
    values = {
        "logp": old, "logp_old": old, "logp_teacher": old - differences,
        "advantages": torch.tensor([advantage]), "mask": torch.ones(1, 2),
    }  # fmt: skip
    below, above = (gradient("trrd", values)[0] != 0).tolist()
    assert (below, above) == ((True, False) if advantage > 0 else (False, True))
    flat = is_clipped(trrd_log_ratio(old, old, old - differences), values["advantages"], **CLIP)
    assert flat.tolist() == [[not below, not above]]


@pytest.mark.parametrize(("clamp_gradient", "slope"), [("stop", 0.5), ("straight_through", 1.0)])
def test_gradient_through_the_clamp_is_an_option(
    clamp_gradient: Literal["stop", "straight_through"], slope: float
) -> None:
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[-1.5, -4.0]])  # inside and outside the range
    trrd_log_ratio(logp, logp.detach(), teacher, clamp_gradient=clamp_gradient).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [[1.0, slope]]


def test_clamp_bounds_the_weight_of_disliked_tokens() -> None:
    """A < 0 without a clamp weighs exp(d/2) without bound; with it at most exp(1/2)."""
    logp = torch.full((1, 1), -1.0)
    far = torch.full((1, 1), -13.0)
    assert trrd_log_ratio(logp, logp, far, teacher_clamp=None).exp().item() == pytest.approx(math.exp(6))
    assert trrd_log_ratio(logp, logp, far).exp().item() == pytest.approx(math.exp(0.5))


@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.floats(-100, 100), st.floats(0.1, 10))
def test_advantages_do_not_change_with_shift_and_scale(rewards: list[float], shift: float, scale: float) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    if values.max() - values.min() < 1e-3:
        return
    torch.testing.assert_close(
        group_advantages(values * scale + shift, 4), group_advantages(values, 4), rtol=1e-6, atol=1e-6
    )


def test_advantages_use_the_population_deviation() -> None:
    assert group_advantages(torch.tensor([0.0, 2.0, 5.0, 5.0]), 2).tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_a_group_of_equal_rewards_gets_exact_zeros() -> None:
    assert not group_advantages(torch.full((12,), 0.1), 12).any()


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rewards cannot be split into groups of 2"):
        group_advantages(torch.zeros(5), 2)


def test_sequence_mean_weighs_every_row_alike() -> None:
    per_token = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    assert sequence_mean(per_token, mask).item() == 3.0
    assert sequence_mean(per_token, torch.zeros_like(mask)).item() == 0.0


def test_per_token_advantages_are_those_of_rows_when_equal() -> None:
    values = batch()
    spread = values["advantages"][:, None].expand(6, 9)
    ratio = values["logp"] - values["logp_old"]
    torch.testing.assert_close(
        clipped_surrogate(ratio, spread, **CLIP), clipped_surrogate(ratio, values["advantages"], **CLIP)
    )


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    """Weighted by the policy, k3 sums to KL exactly; the gradient of k2 equals that of KL."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.1, 0.4, -0.3], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp - other)).sum()
    torch.testing.assert_close((logp.exp() * kl_k3(logp, other)).sum(), exact)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (estimated,) = torch.autograd.grad((logp.detach().exp() * kl_k2(logp, other)).sum(), logits)
    torch.testing.assert_close(estimated, wanted)


def test_kdrl_weight_falls_linearly_to_its_floor() -> None:
    assert [kdrl_weight(s) for s in (0, 40, 80, 1000)] == pytest.approx([5e-3, 3e-3, 1e-3, 1e-3])
