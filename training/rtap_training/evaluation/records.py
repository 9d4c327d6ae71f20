"""Records of evaluation runs and their storage.

A run is one stopping rule on the questions of one task. Runs are stored in full, so metrics can be recomputed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, SINGLE, VOTE


@dataclass(frozen=True, slots=True)
class Load:
    """Request settings of a run. seed: base of the per-question seeds. max_cycles, max_tokens,
    recursion: None for the server's default."""

    concurrency: int
    temperature: float
    seed: int
    max_cycles: int | None = None
    max_tokens: int | None = None
    recursion: str | None = None


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One stopping rule.

    rule: one of RULES, or a rule of replays. threshold: of CONFIDENCE, and of an adaptive vote. samples: of a vote, at
    most.
    """

    rule: str
    threshold: float | None = None
    samples: int | None = None

    @property
    def label(self) -> str:
        """Short name for tables, e.g. ``confidence@0.5`` or ``vote x8``."""
        name = self.rule if self.threshold is None else f"{self.rule}@{self.threshold:.4g}"
        return name if self.samples is None else f"{name} x{self.samples}"

    def request(self, load: Load) -> dict[str, Any]:
        """The ``rtap`` request field of this rule."""
        is_vote = self.rule in (VOTE, ADAPTIVE, CGES)
        field = {
            "policy": VOTE if is_vote else self.rule,
            "threshold": 1.0 if self.rule == VOTE else self.threshold,  # VOTE draws all samples
            "samples": self.samples,
            "max_cycles": None if is_vote or self.rule == SINGLE else load.max_cycles,
            "recursion": load.recursion if self.rule == CONFIDENCE else None,
        }
        return {name: value for name, value in field.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Round:
    """Duration of a round. session: start time of the evaluation that ran it."""

    number: int
    seconds: float
    session: str


@dataclass(frozen=True, slots=True)
class CycleRecord:
    """One cycle or vote sample.

    answer: extracted from ``text``, the whole text after the thought; None if the cycle was cut before its end.
    confidence: None if the cycle was not scored. cached_tokens: None if the server does not report it.
    seconds: including confidence_seconds of scoring. logprobs: features of the log-probabilities, where
    the server's confidence is made of them. confidence_tokens: read by the generator; None if unknown.
    """

    answer: str | None
    is_correct: bool = False
    confidence: float | None = None
    tokens: int = 0
    oops_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    seconds: float = 0.0
    confidence_seconds: float | None = None
    think: str | None = None
    text: str | None = None
    logprobs: Mapping[str, float] | None = None
    confidence_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one question.

    index: position in the task's questions. error: reason of a failure; then the other fields are empty. policy_tokens:
    sampled and injected tokens, returned or not. generator_tokens: tokens read by the confidence generator.
    """

    index: int
    error: str | None = None
    answer: str | None = None
    is_correct: bool = False
    stop_reason: str = ""
    policy_tokens: int = 0
    generator_tokens: int = 0
    seconds: float = 0.0
    first_answer_seconds: float | None = None
    degraded: str | None = None
    cycles: tuple[CycleRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One rule on one task.

    wall_seconds: from the first request to the last answer, over all rounds; None if unknown (kept samples, or a round
    that was interrupted). rounds: duration of each round.
    """

    task: str
    spec: RunSpec
    outcomes: tuple[Outcome, ...]
    wall_seconds: float | None
    rounds: tuple[Round | None, ...] = ()

    @property
    def answered(self) -> list[Outcome]:
        """Outcomes without the failed requests."""
        return [outcome for outcome in self.outcomes if outcome.error is None]


_LINE: TypeAdapter[Outcome | Round] = TypeAdapter(Outcome | Round)


class RunFile:
    """A run on disk, one JSON line an answer, not yet judged, and a finished round. A killed run goes on after the last
    whole line. ``outcomes`` has failed requests too, but these are not stored: a resumed run asks them again."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Read what an earlier session stored; without ``resume``, drop it."""
        self._path = path
        self.outcomes: dict[int, Outcome] = {}
        self.rounds: dict[int, Round] = {}
        text = path.read_text("utf-8") if resume and path.exists() else ""
        text = text[: text.rfind("\n") + 1]
        for line in text.splitlines():
            stored = _LINE.validate_json(line)
            if isinstance(stored, Outcome):
                self.outcomes[stored.index] = stored
            else:
                self.rounds[stored.number] = stored
        write_atomically(path, text)

    def add(self, outcome: Outcome) -> None:
        """Store an outcome."""
        self.outcomes[outcome.index] = outcome
        if outcome.error is None:
            self._append(outcome)

    def end_round(self, finished: Round) -> None:
        """Store the duration of a round whose questions were all asked in one go."""
        self.rounds[finished.number] = finished
        self._append(finished)

    def _append(self, line: Outcome | Round) -> None:
        with self._path.open("ab") as file:
            file.write(_LINE.dump_json(line) + b"\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it over ``path``, so that readers never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
