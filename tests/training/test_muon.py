"""Muon and AdamW as one optimiser."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from rtap_core.errors import ConfigError
from rtap_training.muon import MuonAdamW


class Tiny(nn.Module):
    """One layer with names like a language model's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(5, 4)
        self.model.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.embed(ids)
        for layer in self.model.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


def optimiser_of(model: Tiny) -> MuonAdamW:
    return MuonAdamW(model, matrix_rate=0.02, learning_rate=0.002, betas=(0.9, 0.98), weight_decay=0.1)


def step(model: Tiny, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    model(torch.arange(5)).backward()
    optimiser.step()


def test_only_matrices_of_layers_are_muons() -> None:
    model = Tiny()
    matrices, others = optimiser_of(model).param_groups
    assert [parameter is model.model.layers[0].weight for parameter in matrices["params"]] == [True]
    assert len(others["params"]) == len(list(model.parameters())) - 1
    assert (matrices["lr"], others["lr"]) == (0.02, 0.002)


def test_a_model_without_such_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"matrix_rate=0.1 .* Linear"):
        MuonAdamW(nn.Linear(2, 2), matrix_rate=0.1, learning_rate=0.002, betas=(0.9, 0.98), weight_decay=0.1)


def test_it_does_what_both_do_and_a_schedule_scales_both() -> None:
    model = Tiny()
    twin = deepcopy(model)
    optimiser = optimiser_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (step + 1))
    matrix = twin.model.layers[0].weight
    muon = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p is not matrix], lr=0.002, betas=(0.9, 0.98),
                              weight_decay=0.1)  # fmt: skip
    for count in range(1, 5):
        step(model, optimiser)
        schedule.step()
        for part, rate in ((muon, 0.02), (adamw, 0.002)):
            part.param_groups[0]["lr"] = rate / count
        twin.zero_grad()
        twin(torch.arange(5)).backward()
        muon.step()
        adamw.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(is_loaded: bool) -> None:
    model = Tiny()
    optimiser = optimiser_of(model)
    step(model, optimiser)
    copy = deepcopy(model)
    resumed = optimiser_of(copy)
    if is_loaded:
        resumed.load_state_dict(deepcopy(optimiser.state_dict()))
    for _ in range(3):
        step(model, optimiser)
        step(copy, resumed)
    is_same = all(one.equal(other) for one, other in zip(model.parameters(), copy.parameters(), strict=True))
    assert is_same == is_loaded
