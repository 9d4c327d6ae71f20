"""The cutoff of a trajectory and the drain that cuts all of them."""

import asyncio
import time

from rtap_core.cutoff import Cutoff
from rtap_core.types import StopReason
from rtap_server.engine.drain import Drain


async def test_the_deadline_is_told_once_and_on_time():
    told, began = list[float](), time.monotonic()
    with Cutoff(0.05) as cutoff, cutoff.calling(lambda: told.append(time.monotonic() - began)):
        await asyncio.sleep(0.2)
        cutoff.cut(StopReason.DRAINED)
    assert cutoff.reason is StopReason.DEADLINE
    assert len(told) == 1
    assert 0.05 <= told[0] < 0.15


async def test_outside_its_context_no_time_runs():
    with Cutoff(0.02) as cutoff:
        pass
    await asyncio.sleep(0.06)
    assert cutoff.reason is None


async def test_whoever_comes_after_the_cut_is_told_at_once_and_who_has_left_is_not():
    told, cutoff = list[str](), Cutoff()
    with cutoff.calling(lambda: told.append("left")):
        pass
    cutoff.cut(StopReason.DRAINED)
    with cutoff.calling(lambda: told.append("late")):
        assert told == ["late"]


async def test_the_end_of_a_drain_cuts_what_runs_and_what_still_begins():
    drain = Drain()
    with drain.cutoff(None) as first:
        drain.begin()
        assert (drain.has_begun, first.reason) == (True, None)
        drain.end()
        assert first.reason is StopReason.DRAINED
    with drain.cutoff(9.0) as second:
        assert second.reason is StopReason.DRAINED
