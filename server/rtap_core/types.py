"""The nouns of a recursive trajectory, and the two protocols the loop runs over. Values only: no I/O, no engine."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class Policy(StrEnum):
    """Who decides that a trajectory is finished."""

    CONFIDENCE = "confidence"
    MODEL = "model"
    SINGLE = "single"
    VOTE = "vote"


class Select(StrEnum):
    """Which cycle's answer is returned."""

    BEST = "best"
    LAST = "last"


class StopReason(StrEnum):
    """Why a trajectory ended; the metric label and the response field."""

    THRESHOLD = "threshold"
    MODEL = "model"
    MAX_CYCLES = "max_cycles"
    MAX_TOKENS = "max_tokens"
    DEADLINE = "deadline"
    DRAINED = "drained"
    NO_GAIN = "no_gain"
    VOTE = "vote"


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything that bounds one trajectory. Values are checked where they enter (``http/schema.py``).

    threshold: confidence in [0, 1] that ends a ``confidence`` trajectory.
    samples: independent single cycles of policy ``vote``.
    patience: stop after this many cycles in a row without a new highest confidence; None never stops for it.
    deadline_seconds: kept by the Cutoff (``cutoff.py``) of whoever drives the trajectory.
    max_tokens: one budget over all cycles, injected tags included; None leaves the engine's own limit.
    probe_every: tokens of a ``confidence`` thought between probes for its answer (``probing.py``); None never asks.
    """

    policy: Policy = Policy.CONFIDENCE
    threshold: float = 0.5
    max_cycles: int = 8
    samples: int = 8
    select: Select = Select.BEST
    patience: int | None = None
    deadline_seconds: float | None = None
    max_tokens: int | None = None
    probe_every: int | None = None


@dataclass(frozen=True, slots=True)
class Cycle:
    """One Think–Answer pair as it was written and judged.

    answer: None when the cycle was cut before its answer was complete; such a cycle is never accepted.
    confidence: in [0, 1]; None when nothing scored it.
    tokens: written in this cycle, the injected opening included.
    answer_tokens: those of a complete answer, its tags included.
    prompt_tokens, cached_tokens: what the engine had to read for it, and how much of that was in its prefix cache.
    """

    index: int
    think: str
    answer: str | None
    confidence: float | None
    accepted: bool
    tokens: int
    answer_tokens: int
    oops_tokens: int
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    confidence_seconds: float | None
    confidence_tokens: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A finished trajectory. ``selected`` indexes ``cycles``; None when no cycle has a complete answer.

    degraded: why the generator could not be used, or None.
    first_answer_seconds: from the start of the request until the returned answer was known.
    finish: the engine's own finish of the last cycle, for ``finish_reason``/``stop_reason`` of the response.
    partial_answer: what there was of an answer when every cycle was cut; None when an answer is complete.
    discarded_tokens: sampled ahead of a verdict that made them unwanted, or in a probe; in no cycle, and not returned.
    num_probes, num_stopped: probes of its thoughts, and thoughts that they ended. probe_confidence_tokens: what the
    generator read for them.
    """

    policy: Policy
    stop_reason: StopReason
    cycles: tuple[Cycle, ...]
    selected: int | None
    degraded: str | None
    first_answer_seconds: float | None
    seconds: float
    finish: "Step | None"
    partial_answer: str | None
    discarded_tokens: int = 0
    probe_confidence_tokens: int = 0
    num_probes: int = 0
    num_stopped: int = 0

    @property
    def confidence_tokens(self) -> int:
        """All that the generator read."""
        return sum(c.confidence_tokens for c in self.cycles) + self.probe_confidence_tokens

    @property
    def reasoning_tokens(self) -> int:
        """All generated tokens except those of the returned answer."""
        written = sum(c.tokens for c in self.cycles)
        return written - (0 if self.selected is None else self.cycles[self.selected].answer_tokens)

    @property
    def answer(self) -> str | None:
        """The returned answer."""
        return None if self.selected is None else self.cycles[self.selected].answer

    @property
    def confidence(self) -> float | None:
        """Confidence of the returned answer."""
        return None if self.selected is None else self.cycles[self.selected].confidence


class Step(NamedTuple):  # made for each token: a dataclass that is frozen takes five times as long to fill
    """One piece of what an engine writes in a cycle.

    finished: this is the cycle's last piece.
    truncated: the token limit cut it. ended_turn: the model (or a stop string of the user's) ended the turn,
    as opposed to the format's own end of a cycle.
    native: the engine's own output object, handed back untouched to whoever drives the loop, who may do with it as he
    likes.
    logprobs: log-probabilities by token id at each of ``token_ids``, where the engine was asked for them.
    """

    text: str
    token_ids: Sequence[int]
    finished: bool
    truncated: bool
    ended_turn: bool
    prompt_tokens: int
    cached_tokens: int
    native: Any
    logprobs: Sequence[Mapping[int, Any]] | None = None

    @property
    def sampled_logprobs(self) -> list[tuple[int, Mapping[int, Any]]]:
        """(sampled id, log-probabilities by id there) of each token; none where the engine was not asked for them."""
        return list(zip(self.token_ids, self.logprobs or (), strict=False))


class Engine(Protocol):
    """Writes cycles. The server's is vLLM, training's is the trainer's own generation."""

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Token ids that end an assistant turn; dropped where the loop continues past them."""
        ...

    def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None, may_be_cut: bool
    ) -> AsyncGenerator[Step, None]:
        """Continue ``prompt_token_ids`` until the format's end of a cycle, the end of the turn or the limit.

        Closing the generator early aborts the work. ``index`` numbers the cycle (or the sample, for ``vote``).
        may_be_cut: the loop may do so, and wants to know what was written until then. An engine that was given a Cutoff
        ends the cycle at it, with what it has as the last step."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a tag, without special tokens added."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """What is scored: one cycle alone with the question (R-TAP sec. 3.1), not the earlier cycles.

    question_token_ids: the rendered prompt of the request. cycle_token_ids: opening, think, answer, closing tag.
    context_token_ids: all before the cycle, earlier cycles included; for scorers that go on where the policy stopped.
    logprobs: (sampled id, log-probabilities by id there) of each token that the engine told them of; injected tags are
    not among them.
    request: what the driver of the loop hands to its scorers (the server: its own call, with images and adapter).
    """

    question_token_ids: Sequence[int]
    cycle_token_ids: Sequence[int]
    context_token_ids: Sequence[int]
    logprobs: Sequence[tuple[int, Mapping[int, Any]]] = ()
    request: Any = None


@dataclass(frozen=True, slots=True)
class Score:
    """A confidence in [0, 1] and the number of tokens the scorer had to read for it."""

    confidence: float
    tokens: int = 0


class Confidence(Protocol):
    """Says how likely a cycle's answer is right."""

    async def score(self, judged: Judged) -> Score:
        """Raises ConfidenceError when there is no score; the caller degrades, it does not fail."""
        ...
