"""State that all requests of a server share: settings, format, confidence, counters, graceful shutdown."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rtap_core.artifact import Artifact
from rtap_core.cutoff import Cutoff
from rtap_core.format import TrajectoryFormat
from rtap_core.types import Confidence, Policy, StopReason
from rtap_server.engine.confidence.logprob import FeaturesOnly
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics


class Drain:
    """Graceful shutdown: refuse new requests, let running ones finish, then end them with the best answer so far.

    has_begun: new requests are refused. is_over: running trajectories were cut."""

    def __init__(self) -> None:
        self.has_begun = False
        self.is_over = False
        self._running: set[Cutoff] = set()

    @property
    def num_trajectories(self) -> int:
        """Running trajectories."""
        return len(self._running)

    @contextmanager
    def cutoff(self, deadline_seconds: float | None) -> Generator[Cutoff]:
        """The cutoff of one running trajectory."""
        with Cutoff(deadline_seconds) as cutoff:
            self._running.add(cutoff)
            try:
                if self.is_over:
                    cutoff.cut(StopReason.DRAINED)
                yield cutoff
            finally:
                self._running.discard(cutoff)

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.has_begun = True

    def end(self) -> None:
        """Cut all running trajectories."""
        self.has_begun = self.is_over = True
        for cutoff in tuple(self._running):
            cutoff.cut(StopReason.DRAINED)


@dataclass(frozen=True, slots=True)
class ServerState:
    """Shared by all requests, built once at start.

    model: path or name of the policy. format_source: evidence for its format.
    confidence: None when no confidence source is configured. generator: artifact of the confidence generator.
    count_oops: Oops tokens of a text. decode: text of token ids; the flag leaves out special tokens.
    logprobs: the ``logprobs`` that confidence needs of each cycle.
    shows_cycle_end: the tag that ends a cycle is visible in generated text.
    """

    settings: Settings
    format: TrajectoryFormat
    confidence: Confidence | None
    generator: Artifact
    count_oops: Callable[[str], int]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int], bool], str]
    end_of_turn_ids: frozenset[int]
    metrics: Metrics
    feedback: Feedback
    drain: Drain
    logprobs: int | None = None
    model: str = ""
    format_source: str = ""
    shows_cycle_end: bool = False

    def scorer(self, policy: Policy) -> Confidence | None:
        """Confidence source for the cycles of a request.

        Votes weigh answers by calibrated confidences only: scores that are high for every answer would end a vote after
        two samples. Without calibration answers are counted."""
        if policy is not Policy.VOTE or self.generator.is_calibrated or self.confidence is None:
            return self.confidence
        return FeaturesOnly(self.confidence) if self.settings.confidence_kind == "logprob" else None

    @property
    def cycle_end_ids(self) -> list[int]:
        """The token that ends a cycle; empty when the format's closing tag is not exactly one token."""
        ids = self.encode(self.format.answer_close) if self.format.answer_close else []
        return ids if len(ids) == 1 else []

    @property
    def marks_answers(self) -> bool:
        """A token begins the answer after a thought. Without one a grammar applies from the first token."""
        return len(self.encode(self.format.answer_open or self.format.think_close)) == 1
