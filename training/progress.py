"""What a training loop shows and logs: a progress bar on the terminal and JSON lines beside the checkpoint."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from training.optim import Budget

LOG_EVERY = 20
_SMOOTHING = 0.97


class Progress:
    """Bar and log of one run. The log is ``NAME.train.jsonl`` beside the output, a line every 20 steps."""

    def __init__(self, name: str, output: Path, budget: Budget, *, is_shown: bool = True) -> None:
        self._budget = budget
        self._num_rows = self._num_tokens = 0
        self._loss = 0.0
        self._log = None
        if is_shown:
            output.parent.mkdir(parents=True, exist_ok=True)
            path = output.parent / f"{output.name}.train.jsonl"
            self._log = path.open("w", encoding="utf-8", buffering=1)
        self._bar = tqdm(
            total=100, desc=name, disable=not is_shown, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def record(self, loss: float, *, rows: int, tokens: int) -> None:
        """After a step."""
        self._num_rows += rows
        self._num_tokens += tokens
        self._loss = loss if self._budget.steps == 1 else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        self._bar.set_postfix_str(f"loss {self._loss:.4f}, step {self._budget.steps}")
        self._bar.update(min(100.0, self._budget.progress * 100) - self._bar.n)
        if self._log is not None and self._budget.steps % LOG_EVERY == 0:
            self._log.write(json.dumps(self.summary()) + "\n")

    def summary(self) -> dict[str, Any]:
        """Figures so far."""
        return {
            "steps": self._budget.steps,
            "loss": round(self._loss, 4),
            "rows": self._num_rows,
            "tokens": self._num_tokens,
            "seconds": round(self._budget.seconds, 1),
        }
