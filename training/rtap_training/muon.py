"""Muon for the matrices of the layers with AdamW for embeddings, head and norms, as one optimiser for the Trainer."""

from typing import Any

import torch
from torch.nn import Module, Parameter

from rtap_core.errors import ConfigError


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW on disjoint parameters; the first group of parameters is Muon's.

    A learning-rate schedule scales both rates. Raises ConfigError for a model without matrices in ``layers``.
    """

    def __init__(
        self,
        model: Module,
        *,
        matrix_rate: float,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices: list[Parameter] = []
        others: list[Parameter] = []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
        if not matrices:
            raise ConfigError(
                f"matrix_rate={matrix_rate} needs a model whose layers are named layers; {type(model).__name__} has "
                "none, so leave matrix_rate out"
            )
        self._parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=weight_decay),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient."""
        assert closure is None
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # loading a state replaces both
            part.step()
