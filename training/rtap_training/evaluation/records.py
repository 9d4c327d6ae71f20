"""Records of evaluation runs and their storage.

A run is one stopping rule on the questions of one task. Runs are stored in full, so metrics can be recomputed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rtap_core.answers import answer_key
from rtap_training.evaluation.rules import CONFIDENCE, GENERATOR, LOGPROB, MAJORITY, OWN_SERVER, SINGLE, VOTE
from rtap_training.evaluation.statistics import majority


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One stopping rule.

    rule: one of RULES, or MAJORITY. Rules of OWN_SERVER are policy ``confidence`` on a server with that kind of
    confidence. scored_by: server of the run, GENERATOR or one of OWN_SERVER.
    """

    rule: str
    threshold: float | None = None
    samples: int | None = None
    scored_by: str = GENERATOR

    @property
    def label(self) -> str:
        """Short name for tables, e.g. ``confidence@0.5`` or ``vote x8``."""
        if self.threshold is not None:
            return f"{self.rule}@{self.threshold:.4g}"
        name = f"{self.rule} x{self.samples}" if self.samples is not None else self.rule
        return {GENERATOR: name, LOGPROB: f"{name} plain"}.get(self.scored_by, f"{name} {self.scored_by}")

    def request(self, *, max_cycles: int | None) -> dict[str, Any]:
        """The ``rtap`` request field of this rule."""
        field: dict[str, Any] = {"policy": CONFIDENCE if self.rule in OWN_SERVER else self.rule}
        threshold = 1.0 if self.rule == VOTE else self.threshold  # a vote here is the plain majority of all samples
        if threshold is not None:
            field["threshold"] = threshold
        if self.samples is not None:
            field["samples"] = self.samples
        if max_cycles is not None and self.rule not in (SINGLE, VOTE):
            field["max_cycles"] = max_cycles
        return field


@dataclass(frozen=True, slots=True)
class CycleRecord:
    """One cycle or vote sample.

    answer: extracted from ``text``, the whole text after the thought; None if the cycle was cut before its end.
    confidence: None if the cycle was not scored. cached_tokens: None if the server does not report it.
    seconds: including confidence_seconds of scoring. logprobs: features of the log-probabilities, where
    the server's confidence is made of them.
    """

    answer: str | None
    is_correct: bool
    confidence: float | None
    tokens: int
    oops_tokens: int
    prompt_tokens: int
    cached_tokens: int | None
    seconds: float = 0.0
    confidence_seconds: float = 0.0
    text: str | None = None
    logprobs: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one question.

    index: position in the task's questions. error: reason of a failure; then the other fields are empty. policy_tokens:
    sampled and injected tokens, including discarded probes. generator_tokens: tokens read by the confidence generator.
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

    def majority_of(self, samples: int) -> "Outcome":
        """Plain majority over the first ``samples`` samples of this vote: exact tokens, unknown time."""
        cycles = self.cycles[:samples]
        keys = [None if cycle.answer is None else answer_key(cycle.answer) for cycle in cycles]
        winner = majority(keys)
        standing = None if winner is None else cycles[keys.index(winner)]
        return replace(
            self,
            answer=standing and standing.answer,
            is_correct=standing is not None and standing.is_correct,
            policy_tokens=sum(cycle.tokens for cycle in cycles),
            generator_tokens=0,  # a plain majority needs no generator
            seconds=0.0,
            first_answer_seconds=None,
            cycles=cycles,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One rule on one task. wall_seconds: from the first request to the last answer; None for a run derived from
    another run's samples."""

    task: str
    spec: RunSpec
    outcomes: tuple[Outcome, ...]
    wall_seconds: float | None

    @property
    def answered(self) -> list[Outcome]:
        """Outcomes without the failed requests."""
        return [outcome for outcome in self.outcomes if outcome.error is None]

    def majority_of(self, samples: int) -> "Run":
        """The plain majority vote over the first ``samples`` samples of this vote run."""
        outcomes = tuple(o.majority_of(samples) if o.error is None else o for o in self.outcomes)
        return Run(self.task, replace(self.spec, rule=MAJORITY, samples=samples), outcomes, wall_seconds=None)

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(path, json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> "Run":
        """Read what ``save`` wrote."""
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        outcomes = (
            replace(Outcome(**outcome), cycles=tuple(CycleRecord(**cycle) for cycle in outcome["cycles"]))
            for outcome in stored["outcomes"]
        )
        return Run(stored["task"], RunSpec(**stored["spec"]), tuple(outcomes), stored["wall_seconds"])


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it over ``path``, so that readers never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
