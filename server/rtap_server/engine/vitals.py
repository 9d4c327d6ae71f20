"""Whether an engine does its work: a process that lives but is stopped, or waits for ever, is as good as dead.

The verdict is a pure function of what was seen; looking at processes is a few calls of psutil. Nothing here acts.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import psutil

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


class Verdict(StrEnum):
    """What an engine is."""

    ALIVE = "alive"
    SILENT = "silent"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Sign:
    """One look at an engine. is_busy: it has requests. is_stopped: a process of it is (SIGSTOP, a debugger).
    reads_disk: one waits for a disk or a network share, where it uses no processor. cpu_seconds: used since it began,
    all its processes."""

    is_alive: bool
    is_busy: bool
    is_stopped: bool
    reads_disk: bool
    cpu_seconds: float


class Vitals:
    """Of one engine. silence_seconds: an engine with requests that uses no processor for so long does nothing.

    That a step takes long is no silence: it computes. What spins for ever is left to vLLM's own limit of a step
    (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS).
    """

    def __init__(self, silence_seconds: float, now: float) -> None:
        self.last_progress = now
        self._silence_seconds, self._cpu_seconds = silence_seconds, 0.0

    def observe(self, sign: Sign, now: float) -> Verdict:
        """The verdict after one more look, at ``now`` in monotonic seconds."""
        if not sign.is_alive:
            return Verdict.DEAD
        is_working = sign.reads_disk or sign.cpu_seconds > self._cpu_seconds
        if not sign.is_stopped and (is_working or not sign.is_busy):
            self.last_progress = now
        self._cpu_seconds = sign.cpu_seconds
        return Verdict.SILENT if now - self.last_progress > self._silence_seconds else Verdict.ALIVE


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes of an engine: those of ``pids`` and the workers that they have started, without what is gone."""
    found = list[psutil.Process]()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            found += [parent, *parent.children(recursive=True)]
    return found


def look(processes: Sequence[psutil.Process], *, is_alive: bool, is_busy: bool) -> Sign:
    """An engine as its processes are now. One that is gone makes it dead."""
    is_stopped, reads_disk, cpu_seconds = False, False, 0.0
    for process in processes:
        try:
            with process.oneshot():
                status, times = process.status(), process.cpu_times()
        except psutil.NoSuchProcess:
            is_alive = False
            continue
        is_alive = is_alive and status != psutil.STATUS_ZOMBIE
        is_stopped = is_stopped or status in _STOPPED
        reads_disk = reads_disk or status == psutil.STATUS_DISK_SLEEP
        cpu_seconds += times.user + times.system
    return Sign(is_alive, is_busy, is_stopped, reads_disk, cpu_seconds)
