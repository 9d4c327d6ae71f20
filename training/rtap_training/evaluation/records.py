"""Records of evaluation runs and their storage.

A run is one stopping rule on the questions of one task. Runs are stored in full, so metrics can be recomputed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rtap_training.evaluation.rules import ADAPTIVE, CGES, SINGLE, VOTE


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

    def request(self, *, max_cycles: int | None) -> dict[str, Any]:
        """The ``rtap`` request field of this rule."""
        is_vote = self.rule in (VOTE, ADAPTIVE, CGES)
        field: dict[str, Any] = {"policy": VOTE if is_vote else self.rule}
        threshold = 1.0 if self.rule == VOTE else self.threshold  # VOTE draws all samples
        if threshold is not None:
            field["threshold"] = threshold
        if self.samples is not None:
            field["samples"] = self.samples
        if max_cycles is not None and self.rule != SINGLE and not is_vote:
            field["max_cycles"] = max_cycles
        return field


@dataclass(frozen=True, slots=True)
class Reply:
    """Response to one question, not yet judged. index: position in the task's questions. body: a chat completion.
    error: reason of a failure."""

    index: int
    seconds: float = 0.0
    body: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """Duration of a round. session: start time of the evaluation that ran it; None in old files."""

    seconds: float
    session: str | None


@dataclass(frozen=True, slots=True)
class CycleRecord:
    """One cycle or vote sample.

    answer: extracted from ``text``, the whole text after the thought; None if the cycle was cut before its end.
    confidence: None if the cycle was not scored. cached_tokens: None if the server does not report it.
    seconds: including confidence_seconds of scoring. logprobs: features of the log-probabilities, where
    the server's confidence is made of them. confidence_tokens: read by the generator; None if unknown.
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


class RunFile:
    """A run on disk, one JSON line a reply, a judged answer and a finished round. A killed run goes on after the last
    whole line. replies: those not judged yet."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Read what an earlier session stored; without ``resume``, drop it."""
        self._path = path
        self.outcomes: dict[int, Outcome] = {}
        self.replies: dict[int, Reply] = {}
        self.rounds: dict[int, Round] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in whole_lines(path) if resume else ():
            row: dict[str, Any] = json.loads(line)
            if "round" in row:
                self.rounds[row["round"]] = Round(row["seconds"], row.get("session"))
            elif "body" in row:
                self.replies[row["index"]] = Reply(**row)
            else:
                cycles = tuple(CycleRecord(**cycle) for cycle in row["cycles"])
                self.outcomes[row["index"]] = replace(Outcome(**row), cycles=cycles)
                self.replies.pop(row["index"], None)
        kept = [asdict(one) for one in [*self.outcomes.values(), *self.replies.values()]]
        rounds = [{"round": number, **asdict(one)} for number, one in self.rounds.items()]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in [*kept, *rounds]))

    def add_reply(self, reply: Reply) -> None:
        """Store a reply until it is judged; a failed one is asked again."""
        if reply.error is None:
            self.replies[reply.index] = reply
            self._append(asdict(reply))

    def add(self, outcome: Outcome) -> None:
        """Store an outcome; a failed one is forgotten, so that it is asked again."""
        self.replies.pop(outcome.index, None)
        if outcome.error is None:
            self.outcomes[outcome.index] = outcome
            self._append(asdict(outcome))

    def end_round(self, number: int, finished: Round) -> None:
        """Store the duration of a round whose questions were all asked in one go."""
        self.rounds[number] = finished
        self._append({"round": number, **asdict(finished)})

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def whole_lines(path: Path) -> Iterator[str]:
    """Lines of a file that may not exist, without a last one that was cut while it was written."""
    text = path.read_text("utf-8") if path.exists() else ""
    return iter(text.split("\n")[:-1])


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it over ``path``, so that readers never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
