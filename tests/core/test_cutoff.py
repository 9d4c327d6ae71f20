"""Deadline and cut of a trajectory."""

import asyncio
import time

from rtap_core.cutoff import Cutoff
from rtap_core.types import StopReason


async def test_the_deadline_calls_back_once_and_on_time():
    calls, began = list[float](), time.monotonic()
    with Cutoff(0.05) as cutoff, cutoff.on_cut(lambda: calls.append(time.monotonic() - began)):
        await asyncio.sleep(0.2)
        cutoff.cut(StopReason.DRAINED)
    assert cutoff.reason is StopReason.DEADLINE
    assert len(calls) == 1
    assert 0.05 <= calls[0] < 0.15


async def test_outside_its_context_no_time_runs():
    with Cutoff(0.02) as cutoff:
        pass
    await asyncio.sleep(0.06)
    assert cutoff.reason is None


async def test_a_callback_after_the_cut_is_called_at_once_and_one_that_has_left_is_not():
    calls, cutoff = list[str](), Cutoff()
    with cutoff.on_cut(lambda: calls.append("left")):
        pass
    cutoff.cut(StopReason.DRAINED)
    with cutoff.on_cut(lambda: calls.append("late")):
        assert calls == ["late"]
