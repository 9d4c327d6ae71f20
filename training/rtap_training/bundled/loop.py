"""Resumable training loop of the supervised stages: budget, schedule, log and states.

A run of ``max_steps`` steps that is killed and resumed gives the same losses and weights as an uninterrupted one. A run
of ``minutes`` keeps count of the time used. The caller computes the loss of each step.
"""

import math
import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rtap_training.bundled.streams import Stream
from rtap_training.huggingface import cast_to, save_checkpoint
from rtap_training.optim import Budget, descend, schedule
from rtap_training.progress import Progress
from rtap_training.run_state import States
from rtap_training.training_errors import TrainingError


class LoopConfig(Protocol):
    """Loop settings. max_steps 0: train for ``minutes``. save_steps 0: save by ``save_minutes`` alone."""

    @property
    def minutes(self) -> float: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def save_steps(self) -> int: ...
    @property
    def save_minutes(self) -> float: ...
    @property
    def warmup_share(self) -> float: ...


class Loop:
    """Training loop: ``with Loop(...) as loop: while loop.should_continue(): loop.descend(...)``."""

    def __init__(
        self,
        name: str,
        config: LoopConfig,
        states: States,
        *,
        model: Module,
        optimisers: Sequence[torch.optim.Optimizer],
        stream: Stream[Any],
    ) -> None:
        self._config = config
        self._states = states
        self._model = model
        self._optimisers = optimisers
        self._stream = stream
        self._factor = 0.0
        self._saved = monotonic()
        last = states.last
        shared, own = states.load(last) if last is not None else ({}, {})
        self._saved_step: int = shared.get("steps", 0)
        self._budget = Budget(config.minutes, config.max_steps, used=shared.get("seconds", 0.0), steps=self._saved_step)
        self._progress = Progress(name, states.folder, self._budget)
        if last is not None:
            self._load(shared, own)

    def __enter__(self) -> "Loop":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def should_continue(self) -> bool:
        """Return True while the budget lasts. Saves a state when one is due and after the last step."""
        steps, config = self._budget.steps, self._config
        is_time = monotonic() - self._saved > config.save_minutes * 60
        done = self._budget.progress
        is_step = config.save_steps > 0 and steps % config.save_steps == 0
        if steps > self._saved_step and (is_step or is_time or done >= 1):
            self._save()
        self._factor = schedule(done, warmup_share=config.warmup_share)
        return done < 1

    def descend(self, loss: Tensor, *, rows: int, tokens: int) -> None:
        """One optimiser step. Raises TrainingError when the loss or a gradient is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise self._broken(f"the loss is {value}")
        try:
            descend(loss, self._optimisers, factor=self._factor)
        except FloatingPointError as error:
            raise self._broken(str(error)) from error
        self._budget.steps += 1
        self._progress.record(value, rows=rows, tokens=tokens)

    def summary(self) -> dict[str, Any]:
        """Totals of the run so far."""
        return self._progress.summary()

    def _broken(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at step {self._budget.steps + 1}; {self._states.resume_hint}. Try lower learning rates, with "
            f"another output or with {self._states.folder} removed"
        )

    def _save(self) -> None:
        shared = {
            "model": self._model.state_dict(),
            "optimisers": [o.state_dict() for o in self._optimisers],
            "steps": self._budget.steps,
            "seconds": self._budget.seconds,
            "progress": self._progress.state_dict(),
        }
        own = {"stream": self._stream.state_dict(), "python": random.getstate(), "torch": torch.get_rng_state()}
        self._states.save(self._budget.steps, shared, own)
        self._saved, self._saved_step = monotonic(), self._budget.steps

    def _load(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self._model.load_state_dict(shared["model"])
        for optimiser, state in zip(self._optimisers, shared["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self._progress.load_state_dict(shared["progress"])
        self._stream.load_state_dict(own["stream"])
        random.setstate(own["python"])
        torch.set_rng_state(own["torch"])


def save(output: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]) -> None:
    """Save a bf16 copy; the model itself stays fp32."""
    copy = deepcopy(model)
    cast_to(copy, torch.bfloat16)
    save_checkpoint(output, copy, tokenizer, record)
