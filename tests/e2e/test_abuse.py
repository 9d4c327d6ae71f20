"""Attacks of the abuse test that take seconds, on the shared server. Latencies are judged by `make stress`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.stress.abuse import attack_once
from tests.stress.abuse_attacks import ATTACKS, Target

SHORT = (
    "multiplied-completion",
    "duplicate-content-types",
    "long-texts",
    "invalid-grammars",
    "forged-log-record",
    "invalid-bytes",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if attack.name in SHORT], ids=lambda attack: attack.name
)
async def test_an_attack_is_answered_as_expected_and_good_requests_with_it(server, attack):
    with ThreadPoolExecutor(1) as pool:
        row = await attack_once(attack, Target(server.url, log=server.log), "", list, pool)
    assert row.outcome.problems == []
    assert row.watch.failures == []
