"""Progress bar, JSON-lines log and TensorBoard events of a training loop."""

from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from rtap_training.events import FOLDER, open_events
from rtap_training.optim import Budget
from rtap_training.run_state import LineLog
from rtap_training.training_errors import TrainingError

LOG_EVERY = 20
_SMOOTHING = 0.97


class Progress:
    """Bar and logs of one run: ``train.jsonl`` and ``tensorboard``, every 20 steps and at the end.

    A run resumed at ``budget.steps`` drops later entries and logs them again.
    """

    def __init__(self, name: str, folder: Path, budget: Budget) -> None:
        self._budget = budget
        self._num_rows = self._num_tokens = 0
        self._loss = 0.0
        self._logged_step = budget.steps
        self._log = LineLog(folder / "train.jsonl", resumed_at=budget.steps)
        self._events = open_events(folder / FOLDER, resumed_at=budget.steps)
        self._bar = tqdm(total=100, desc=name, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if error is None and self._budget.steps > self._logged_step:
            self._write()
        self._events.close()

    def record(self, loss: float, *, rows: int, tokens: int) -> None:
        """Record one step. Raises TrainingError when the log cannot be written."""
        self._num_rows += rows
        self._num_tokens += tokens
        self._loss = loss if self._budget.steps == 1 else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        self._bar.set_postfix_str(f"loss {self._loss:.4f}, step {self._budget.steps}")
        self._bar.update(min(100.0, self._budget.progress * 100) - self._bar.n)
        if self._budget.steps % LOG_EVERY == 0:
            self._write()

    def _write(self) -> None:
        self._logged_step = self._budget.steps
        try:
            self._log.write({"step": self._budget.steps} | self.summary())
            for name, value in (("loss", self._loss), ("rows", self._num_rows), ("tokens", self._num_tokens)):
                self._events.add_scalar(f"train/{name}", value, self._budget.steps)
        except OSError as error:
            raise TrainingError(f"cannot log step {self._budget.steps}: {error}") from error

    def summary(self) -> dict[str, Any]:
        """Totals so far."""
        return {
            "steps": self._budget.steps,
            "loss": round(self._loss, 4),
            "rows": self._num_rows,
            "tokens": self._num_tokens,
            "seconds": round(self._budget.seconds, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals to resume from."""
        return {"loss": self._loss, "rows": self._num_rows, "tokens": self._num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the totals of a state."""
        self._loss, self._num_rows, self._num_tokens = state["loss"], state["rows"], state["tokens"]
