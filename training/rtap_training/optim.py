"""Optimisers, learning-rate schedule and training budget.

Muon (Jordan et al. 2024) updates hidden matrices along their orthogonalised momentum; AdamW updates the rest.
"""

import math
from collections.abc import Iterable
from time import monotonic
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

MAX_GRADIENT_NORM = 1.0


def build_adamw(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


class Muon(torch.optim.Optimizer):
    """Muon for 2-D hidden weights, in fp32 because bf16 is slow on CPUs."""

    def __init__(
        self, parameters: Iterable[Parameter], *, learning_rate: float, momentum: float = 0.95, weight_decay: float
    ) -> None:
        super().__init__(list(parameters), {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One Nesterov step for all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in cast(list[Parameter], group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = cast(Tensor, state.setdefault("momentum", torch.zeros_like(parameter)))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))
                # Tall matrices get a larger step: every shape then changes its outputs by the same amount.
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Push all singular values of a 2-D ``matrix`` towards 1 with a quintic Newton–Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0, so that five steps suffice; values end within about 0.7..1.2
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def build_muon(
    named: Iterable[tuple[str, Parameter]], *, matrix_rate: float, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for embeddings, head and norms."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in named:
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    muon = Muon(matrices, learning_rate=matrix_rate, weight_decay=weight_decay)
    return [muon, build_adamw(others, learning_rate=learning_rate, weight_decay=weight_decay)]


def descend(loss: Tensor, optimisers: Iterable[torch.optim.Optimizer], *, factor: float) -> None:
    """One optimiser step on ``loss``: clip gradients, scale peak rates by ``factor``.

    Raises FloatingPointError before any weight changes when a gradient is not finite.
    """
    loss.backward()
    chosen = list(optimisers)
    parameters = [p for o in chosen for g in o.param_groups for p in cast(list[Parameter], g["params"])]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    if not norm.isfinite():
        raise FloatingPointError(f"the gradient's norm is {norm.item()}")
    for optimiser in chosen:
        for group in optimiser.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def schedule(progress: float, *, warmup_share: float) -> float:
    """Factor on the peak rate at ``progress`` in [0, 1]: linear warm-up, then cosine down to a tenth."""
    if progress < warmup_share:
        return max(progress, 1e-3) / warmup_share
    cosine = (1 + math.cos(math.pi * min(1.0, (progress - warmup_share) / (1 - warmup_share)))) / 2
    return 0.1 + 0.9 * cosine


class Budget:
    """Budget of a run: ``max_steps`` steps, or ``minutes`` when ``max_steps`` is 0.

    used, steps: seconds and steps of the run before it was resumed.
    """

    def __init__(self, minutes: float, max_steps: int, *, used: float = 0.0, steps: int = 0) -> None:
        self._limit = minutes * 60
        self._max_steps = max_steps
        self._started = monotonic() - used
        self.steps = steps

    @property
    def seconds(self) -> float:
        """Seconds used so far."""
        return monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the budget used; at least 1 at its end. Counts steps alone if ``max_steps`` is set: reproducible."""
        return self.steps / self._max_steps if self._max_steps else self.seconds / self._limit
