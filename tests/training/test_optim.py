"""Schedule and optimiser laws."""

import pytest
import torch
from torch.nn import Linear, Parameter

from rtap_training.optim import Budget, build_adamw, build_muon, descend, orthogonalise, schedule


def test_schedule_warms_up_then_falls_to_a_tenth() -> None:
    values = [schedule(i / 100, warmup_share=0.1) for i in range(101)]
    assert values[0] < 0.02
    assert max(values) == pytest.approx(1.0) == values[10]
    assert values[-1] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_muon_takes_layer_matrices_only() -> None:
    named = [
        ("model.embed_tokens.weight", Parameter(torch.zeros(4, 4))),
        ("model.layers.0.mlp.up_proj.weight", Parameter(torch.zeros(4, 4))),
        ("model.layers.0.input_layernorm.weight", Parameter(torch.zeros(4))),
    ]
    muon, adamw = build_muon(named, matrix_rate=0.1, learning_rate=0.2, weight_decay=0.3)
    assert [p is named[1][1] for p in muon.param_groups[0]["params"]] == [True]
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.3, 0.0]


def test_descent_finds_a_least_squares_solution() -> None:
    torch.manual_seed(0)
    layer, truth = Linear(6, 3), Linear(6, 3)
    optimisers = build_muon(
        [("x.layers.0.weight", layer.weight), ("bias", layer.bias)], matrix_rate=0.05, learning_rate=0.05,
        weight_decay=0.0,
    )  # fmt: skip
    inputs = torch.randn(64, 6)
    with torch.no_grad():
        target = truth(inputs)
    losses: list[float] = []
    for step in range(300):
        loss = (layer(inputs) - target).square().mean()
        descend(loss, optimisers, factor=schedule(step / 300, warmup_share=0.1))
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 50


def test_rates_follow_the_factor_and_do_not_compound() -> None:
    weight = Parameter(torch.ones(2, 2))
    optimiser = build_adamw([weight], learning_rate=0.1, weight_decay=0.0)
    for _ in range(3):
        descend(weight.sum(), [optimiser], factor=0.5)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    weight = Parameter(torch.ones(2, 2))
    optimiser = build_adamw([weight], learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(FloatingPointError, match="the gradient's norm is inf"):
        descend((weight * float("inf")).sum(), [optimiser], factor=1.0)
    assert weight.equal(torch.ones(2, 2))


def test_a_budget_of_steps_ignores_the_clock() -> None:
    budget = Budget(minutes=1e-9, max_steps=4)
    assert budget.progress == 0
    budget.steps = 4
    assert budget.progress == 1


def test_a_budget_of_minutes_counts_those_used_before() -> None:
    budget = Budget(minutes=60, max_steps=0, used=1800, steps=7)
    assert budget.progress == pytest.approx(0.5, abs=0.001)
    assert budget.seconds == pytest.approx(1800, abs=1)
