"""Leaving without losing work: no new requests, those that run go on for a while, then they are answered as they are.

State only. Signals and the end of the process are ``serving.py``'s, refusing is the middleware's.
"""

from collections.abc import Generator
from contextlib import contextmanager

from rtap_core.cutoff import Cutoff
from rtap_core.types import StopReason


class Drain:
    """has_begun: new work is refused. is_over: what still runs was told to end."""

    def __init__(self) -> None:
        self.has_begun = False
        self.is_over = False
        self._running: set[Cutoff] = set()

    @property
    def trajectories(self) -> int:
        """How many are running."""
        return len(self._running)

    @contextmanager
    def cutoff(self, deadline_seconds: float | None) -> Generator[Cutoff]:
        """The cutoff of one trajectory, while it runs."""
        with Cutoff(deadline_seconds) as cutoff:
            self._running.add(cutoff)
            try:
                if self.is_over:
                    cutoff.cut(StopReason.DRAINED)
                yield cutoff
            finally:
                self._running.discard(cutoff)

    def begin(self) -> None:
        """Take nothing new."""
        self.has_begun = True

    def end(self) -> None:
        """Whatever runs is answered with what there is of it."""
        self.has_begun = self.is_over = True
        for cutoff in tuple(self._running):
            cutoff.cut(StopReason.DRAINED)
