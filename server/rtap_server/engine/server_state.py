"""State that all requests of a server share, built once at start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rtap_core.artifact import Artifact
from rtap_core.format import TrajectoryFormat
from rtap_core.types import Confidence
from rtap_server.engine.drain import Drain
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import Tracing


@dataclass(frozen=True, slots=True)
class ServerState:
    """What every request shares: the format, the scorer, defaults, counters; spans, where they are asked for.

    logprobs: how many the scorer needs of each sampled token. shows_cycle_end: a reply's text has the tag that
    ends a cycle.
    """

    settings: Settings
    format: TrajectoryFormat
    confidence: Confidence | None
    generator: Artifact
    count_oops: Callable[[str], int]
    encode: Callable[[str], list[int]]
    end_of_turn_ids: frozenset[int]
    metrics: Metrics
    feedback: Feedback
    drain: Drain
    logprobs: int | None = None
    tracing: "Tracing | None" = None
    shows_cycle_end: bool = False

    @property
    def cycle_end_ids(self) -> list[int]:
        """The one token that ends a cycle, where the format has such a tag as a token of its own."""
        ids = self.encode(self.format.answer_close) if self.format.answer_close else []
        return ids if len(ids) == 1 else []
