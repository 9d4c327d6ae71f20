"""Half a minute of `make soak` on the shared server, without kills: nothing is left over, all counters agree, and
nothing is written to the disk but the log.

The command's half an hour does not fit into CI; growth of memory is judged there (docs/results/soak.md).
"""

import psutil
import pytest
from soak import SoakConfig, soak


@pytest.mark.slow
async def test_after_mixed_traffic_nothing_is_left_and_every_counter_is_what_clients_saw(server):
    config = SoakConfig(seconds=20, warm_seconds=5, clients=8, seed=1, kill_seconds=None)
    soaked = await soak(server.url, psutil.Process(server.process.pid), server.log, config, print)
    assert not soaked.tally.errors
    assert [check for check in soaked.checks if not check.kept] == []
    for kind in ("plain", "several choices", "vote", "deadline", "bad", "left", "other routes", "judged"):
        assert soaked.tally.asked[kind]
    assert sum(soaked.tally.trajectories.values()) > 20
