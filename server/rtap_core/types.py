"""Vocabulary of the project: requests' limits, cycles, trajectories, and the Engine and Confidence protocols.

Sources: R-TAP (Recursive Think-Answer Process, arXiv 2603.02099). Values only: no I/O, no engine.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from rtap_core.features import LogprobFeatures

SampledLogprobs = Sequence[tuple[int, Mapping[int, Any]]]
"""One entry per sampled token: its id, and the engine's log-probabilities (nats) by token id at that position."""


class Policy(StrEnum):
    """Rule that ends a trajectory.

    confidence: a cycle's confidence reaches the threshold. model: the model ends its turn (R-TAP's own inference).
    single: after one cycle. vote: independent samples in waves, until the posterior of the leading answer reaches the
    threshold.
    """

    CONFIDENCE = "confidence"
    MODEL = "model"
    SINGLE = "single"
    VOTE = "vote"


class Continuation(StrEnum):
    """Start of a further cycle: after all earlier ones (``continue``), or on the question alone (``fresh``)."""

    CONTINUE = "continue"
    FRESH = "fresh"


class Select(StrEnum):
    """Cycle whose answer is returned: the most confident (``best``) or the last complete one (``last``)."""

    BEST = "best"
    LAST = "last"


class StopReason(StrEnum):
    """Reason that a trajectory ended. The values are metric labels and appear in responses."""

    THRESHOLD = "threshold"
    MODEL = "model"
    MAX_CYCLES = "max_cycles"
    MAX_TOKENS = "max_tokens"
    DEADLINE = "deadline"
    DRAINED = "drained"
    NO_GAIN = "no_gain"
    SAMPLES = "samples"
    AGREEMENT = "agreement"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one trajectory. ``http/schema.py`` validates them.

    threshold: confidence in [0, 1] that ends a ``confidence`` trajectory.
    samples: number of samples of a ``vote``.
    recursion: start of further cycles under ``confidence``.
    patience: cycles in a row without a new highest confidence before the trajectory ends; None: unlimited.
    deadline_seconds: enforced by ``cutoff.Cutoff``, which the caller of the loop starts.
    max_tokens: budget over all cycles, injected tags included (``vote``: per sample); None: the engine's own limit.
    thinking_tokens: budget over the thoughts of all cycles (``vote``: per sample); None: only ``max_tokens``.
    stop, stop_token_ids: strings and token ids that end the answer of a cycle. Thoughts ignore them.
    include_stop: keep the string, or the token's text, in the answer.
    """

    policy: Policy = Policy.CONFIDENCE
    threshold: float = 0.5
    max_cycles: int = 8
    samples: int = 8
    select: Select = Select.BEST
    recursion: Continuation = Continuation.CONTINUE
    patience: int | None = None
    deadline_seconds: float | None = None
    max_tokens: int | None = None
    thinking_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Set[int] = frozenset()
    include_stop: bool = False

    @property
    def stops_answers(self) -> bool:
        """True if something besides the model ends the answer of a cycle."""
        return bool(self.stop or self.stop_token_ids)


@dataclass(frozen=True, slots=True)
class Cycle:
    """One finished Think–Answer pair and its score.

    index: position in the trajectory, or sample number of a vote, from 0.
    answer: None if the cycle was cut before its answer was complete; such a cycle is never accepted.
    confidence: in [0, 1]; None if the cycle was not scored.
    accepted: True for the returned cycle.
    tokens: all tokens of this cycle, injected tags included. answer_tokens, oops_tokens: parts of them.
    answer_tokens: tokens of a complete answer, its tags included; 0 if there is none.
    oops_tokens: tokens of self-doubt phrases (``lexicon.py``).
    prompt_tokens, cached_tokens: length of the cycle's prompt, and the part of it found in the prefix cache.
    seconds: writing and scoring. confidence_seconds: the scoring part; None if nothing was scored.
    confidence_tokens: tokens that the confidence generator read.
    stop: string or token id at which the request, and not the model, ended the cycle.
    logprobs: features of the log-probabilities, where confidence is computed from them alone.
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
    stop: str | int | None = None
    logprobs: LogprobFeatures | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A finished trajectory.

    policy: as requested, even if a failing generator changed it on the way.
    cycles: in order of ``index``.
    selected: position in ``cycles`` of the returned answer; None if no cycle has a complete one.
    degraded: reason label of a failed confidence generator; None if it did not fail.
    first_answer_seconds: from the start of the trajectory to the first complete answer of any cycle or sample, its
        scoring included where the policy scores; None if no answer is complete.
    seconds: from the start of the trajectory to its end.
    finish: the engine's last step of the last cycle (``vote``: of the returned sample), for ``finish_reason``.
    partial_answer: text of an incomplete answer if no cycle has a complete one; else None.
    is_fresh_fallback: a continued cycle was empty, and the next ones were fresh.
    discarded_tokens: sampled beyond the end of the last cycle; in no cycle and not returned.
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
    is_fresh_fallback: bool = False
    discarded_tokens: int = 0

    @property
    def accepted(self) -> Cycle | None:
        """The cycle whose answer is returned."""
        return None if self.selected is None else self.cycles[self.selected]

    @property
    def answer(self) -> str | None:
        """The returned answer."""
        return None if self.accepted is None else self.accepted.answer

    @property
    def confidence(self) -> float | None:
        """Confidence of the returned answer."""
        return None if self.accepted is None else self.accepted.confidence

    @property
    def reasoning_tokens(self) -> int:
        """All tokens except those of the returned answer."""
        returned = 0 if self.accepted is None else self.accepted.answer_tokens
        return sum(c.tokens for c in self.cycles) - returned

    @property
    def confidence_tokens(self) -> int:
        """All tokens that the confidence generator read."""
        return sum(c.confidence_tokens for c in self.cycles)


class Step(NamedTuple):  # one per token: a frozen dataclass takes five times as long to construct
    """One piece of a cycle, as an engine yields it.

    token_ids: new ids, usually one. finished: last step of the cycle.
    truncated: the token limit cut the cycle.
    ended_turn: the model, or a stop of the request, ended the turn (False at the format's own end of a cycle).
    ended_text: a stop of the request ended the whole text, thoughts included: no cycle follows.
    prompt_tokens, cached_tokens: as in Cycle.
    native: the engine's own output object, passed through for the caller of the loop, which may modify it.
    logprobs: one mapping per token id, if the engine was asked for log-probabilities.
    stop_reason: as vLLM's: string or token id at which the cycle ended, if that is no end of turn or cycle.
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
    ended_text: bool = False
    stop_reason: str | int | None = None

    @classmethod
    def injected(cls, token_ids: Sequence[int], text: str) -> "Step":
        """A tag that the server inserts into the trajectory."""
        return cls(text, token_ids, False, False, False, 0, 0, native=None)

    @property
    def sampled_logprobs(self) -> list[tuple[int, Mapping[int, Any]]]:
        """Log-probabilities of this step's tokens; empty if the engine was not asked for them."""
        return list(zip(self.token_ids, self.logprobs or (), strict=False))


class Engine(Protocol):
    """Text generation, one cycle at a time. The server implements it on vLLM, training on its own sampler."""

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Token ids that end an assistant turn. The loop strips them before it continues."""
        ...

    def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        """Continue ``prompt_token_ids`` to the end of the cycle, the end of the turn or ``max_tokens``.

        index: number of the cycle or, for ``vote``, of the sample.
        Closing the generator early aborts the generation. At its Cutoff an engine yields a last step with what it has.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a tag, without added special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """Input of a confidence scorer: the question and one cycle, without the earlier cycles (R-TAP sec. 3.1).

    question_token_ids: the rendered prompt of the request.
    cycle_token_ids: the cycle with its opening and closing tags, without the end of turn.
    context_token_ids: everything before the cycle, for scorers that reuse the policy's prefix cache.
    logprobs: of the sampled tokens, if the engine was asked for them; injected tags have none.
    request: the caller's own request object (the server passes prompt, images and LoRA adapter).
    answer: text of the cycle's answer.
    """

    question_token_ids: Sequence[int]
    cycle_token_ids: Sequence[int]
    context_token_ids: Sequence[int]
    logprobs: SampledLogprobs = ()
    request: Any = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Result of a confidence scorer.

    confidence: in [0, 1]; None if it must not decide anything. tokens: read for it. logprobs: as in Cycle."""

    confidence: float | None
    tokens: int = 0
    logprobs: LogprobFeatures | None = None


class Confidence(Protocol):
    """Estimate of the probability that a cycle's answer is correct."""

    async def score(self, judged: Judged) -> Score:
        """Score one cycle. Raises ConfidenceError; the loop then continues without a generator."""
        ...
