"""Half a minute of the soak test on the shared server, without kills. Growth of memory is judged by `make soak`."""

import psutil
import pytest

from tests.stress.soak import SoakConfig, soak


@pytest.mark.slow
async def test_after_mixed_traffic_nothing_is_left_and_counters_equal_what_clients_saw(server):
    config = SoakConfig(seconds=20, warm_seconds=5, clients=8, seed=1, kill_seconds=None)
    soaked = await soak(server.url, psutil.Process(server.process.pid), server.log, config, print)
    assert not soaked.tally.errors
    assert [check for check in soaked.checks if not check.kept] == []
    for kind in ("plain", "several choices", "vote", "deadline", "bad", "left", "other routes", "judged"):
        assert soaked.tally.sent[kind]
    assert sum(soaked.tally.trajectories.values()) > 20
