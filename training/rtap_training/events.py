"""TensorBoard events: metrics of sampled trajectories and a table of samples."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FOLDER, TAG = "tensorboard", "samples"  # folder in the run folder; tag of the table
SHOWN = ("within_auroc", "global_auroc", "ece", "brier")  # metrics of a generator; the manifest has more
MAX_ROWS = 12  # rows of the table
_MAX_TEXT = 600  # characters per cell


class Checked(Protocol):
    """A cycle whose answer was checked."""

    @property
    def answer(self) -> str | None: ...

    @property
    def is_right(self) -> bool: ...


class CheckedTrajectory(Protocol):
    """A trajectory of checked cycles."""

    @property
    def cycles(self) -> Sequence[Checked]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the table. confidence: of the last cycle; None if it was not scored."""

    question: str
    text: str
    cycles: int
    tokens: int
    is_right: bool
    confidence: float | None = None


def samples_table(samples: Sequence[Sample]) -> str:
    """Markdown table of at most MAX_ROWS samples."""
    lines = ["| right | confidence | cycles | tokens | question | written |", "|---|---|---|---|---|---|"]
    for s in samples[:MAX_ROWS]:
        confidence = "–" if s.confidence is None else f"{s.confidence:.3f}"
        verdict = "yes" if s.is_right else "no"
        lines.append(f"| {verdict} | {confidence} | {s.cycles} | {s.tokens} | {_cell(s.question)} | {_cell(s.text)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text as one line, with Markdown and HTML escaped."""
    short = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
    escaped = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", " ".join(escaped.split()))


def add_events(folder: Path, step: int, scalars: Mapping[str, float], samples: Mapping[str, Sequence[Sample]]) -> None:
    """Add scalars, and one table per entry of ``samples``, to the events in ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    events = SummaryWriter(str(folder))
    for name, value in scalars.items():
        events.add_scalar(name, value, step)
    for name, rows in samples.items():
        events.add_text(name, samples_table(rows), step)
    events.close()


def means_over(turns: Sequence[CheckedTrajectory], *, tokens: int, oops: int) -> dict[str, float]:
    """Means over trajectories. tokens, oops: totals."""
    count = max(1, len(turns))
    return {
        "first_right": sum(t.cycles[0].is_right for t in turns) / count,
        "right": sum(t.cycles[-1].is_right for t in turns) / count,
        "cycles": sum(len(t.cycles) for t in turns) / count,
        "tokens": tokens / count,
        "oops_per_1000_tokens": 1000 * oops / max(1, tokens),
    }


def last_confidences(turns: Sequence[CheckedTrajectory], scores: Sequence[float]) -> list[float | None]:
    """Confidence of each last cycle; None if it has no answer. scores: of all cycles with an answer, in order."""
    rest = iter(scores)
    rows = [[None if c.answer is None else next(rest) for c in t.cycles] for t in turns]
    return [row[-1] if row else None for row in rows]
