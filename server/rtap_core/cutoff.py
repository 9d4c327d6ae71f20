"""When a trajectory must end and be answered with what there is: at its own deadline, or when the server leaves.

Whoever drives a trajectory gives the same Cutoff to the loop and to the engine that writes for it. It keeps the time
and tells; ending the work is theirs.
"""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

from rtap_core.types import StopReason


class Cutoff:
    """Inside the context its time runs. seconds: from there to the deadline; None never comes to one.

    reason: why the work must end now; None while it may go on."""

    def __init__(self, seconds: float | None = None) -> None:
        self.reason: StopReason | None = None
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._acts: list[Callable[[], None]] = []

    def __enter__(self) -> "Cutoff":
        if self._seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self.cut, StopReason.DEADLINE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def cut(self, reason: StopReason) -> None:
        """The work must end. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            for act in tuple(self._acts):
                act()

    @contextmanager
    def calling(self, act: Callable[[], None]) -> Generator[None]:
        """While inside, ``act`` is called when the work must end: at once, where it must already."""
        self._acts.append(act)
        try:
            if self.reason is not None:
                act()
            yield
        finally:
            self._acts.remove(act)
