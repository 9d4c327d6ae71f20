"""Optimiser and learning-rate schedule shared by the commands."""

import math
from collections.abc import Iterable
from time import monotonic

import torch
from torch.nn import Parameter


def build_adamw(parameters: Iterable[Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def schedule(progress: float, *, warmup_share: float) -> float:
    """Factor on the peak rate at ``progress`` in [0, 1]: linear warm-up, then cosine down to a tenth."""
    if progress < warmup_share:
        return max(progress, 1e-3) / warmup_share
    cosine = (1 + math.cos(math.pi * min(1.0, (progress - warmup_share) / (1 - warmup_share)))) / 2
    return 0.1 + 0.9 * cosine


class Budget:
    """Progress through a run that ends after some minutes or steps, whichever comes first."""

    def __init__(self, minutes: float, max_steps: int) -> None:
        self._seconds = minutes * 60
        self._max_steps = max_steps
        self._started = monotonic()
        self.steps = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return monotonic() - self._started

    @property
    def progress(self) -> float:
        """0 at the start, at least 1 when used up."""
        by_steps = self.steps / self._max_steps if self._max_steps else 0.0
        return max(self.seconds / self._seconds, by_steps)
