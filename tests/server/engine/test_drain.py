"""Drain of the server: it cuts every trajectory."""

from rtap_core.types import StopReason
from rtap_server.engine.server_state import Drain


async def test_the_end_of_a_drain_cuts_what_runs_and_what_still_begins():
    drain = Drain()
    with drain.cutoff(None) as first:
        drain.begin()
        assert (drain.has_begun, first.reason) == (True, None)
        drain.end()
        assert first.reason is StopReason.DRAINED
    with drain.cutoff(9.0) as second:
        assert second.reason is StopReason.DRAINED
