"""Processor time of work that a test bounds. The clock on the wall also counts what else runs on the same cores."""

import os
import time
from collections.abc import Awaitable, Callable

RUNS = 3


def cpu_seconds(work: Callable[[], object]) -> float:
    """Least processor time of this thread over three runs of ``work``."""
    return min(_measure(work) for _ in range(RUNS))


async def async_cpu_seconds(work: Callable[[], Awaitable[object]]) -> float:
    """Least processor time of the event loop's thread over three runs of ``work``."""
    seconds = []
    for _ in range(RUNS):
        began = time.thread_time()
        await work()
        seconds.append(time.thread_time() - began)
    return min(seconds)


def child_cpu_seconds(work: Callable[[], object]) -> float:
    """Least processor time of the child processes that ``work`` starts and waits for, over three runs."""
    seconds: list[float] = []
    for _ in range(RUNS):
        before = os.times()
        work()
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)


def _measure(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began
