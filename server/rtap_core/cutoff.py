"""Deadline and drain of a trajectory: the moment at which it must end with the best answer so far.

The loop and the engine of one trajectory share a Cutoff. It keeps the time and calls back; they end the work.
"""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

from rtap_core.types import StopReason


class Cutoff:
    """Context manager that runs a trajectory's deadline.

    seconds: from entering to the deadline; None: no deadline. reason: set once the work must end; None before."""

    def __init__(self, seconds: float | None = None) -> None:
        self.reason: StopReason | None = None
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._callbacks: list[Callable[[], None]] = []

    def __enter__(self) -> "Cutoff":
        if self._seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self.cut, StopReason.DEADLINE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def cut(self, reason: StopReason) -> None:
        """End the work. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            for callback in tuple(self._callbacks):
                callback()

    @contextmanager
    def on_cut(self, callback: Callable[[], None]) -> Generator[None]:
        """Call ``callback`` at the cut, at once if that has been; never after the context is left."""
        self._callbacks.append(callback)
        try:
            if self.reason is not None:
                callback()
            yield
        finally:
            self._callbacks.remove(callback)
