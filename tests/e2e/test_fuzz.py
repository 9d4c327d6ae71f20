"""A short round of `make fuzz` on the shared server: requests that /openapi.json allows, and some it does not."""

from collections import Counter

import httpx
import pytest

from rtap_server.http.route_kinds import RECURSIVE_PATHS
from tests.stress import fuzz


@pytest.mark.slow
def test_no_fuzzed_request_gets_a_5xx_and_the_server_still_works(server):
    before = fuzz.engines_of(server.url)
    report = fuzz.fuzz(server.url, seconds=0, examples=5, seed=0, log_line=print)
    assert not report.findings
    assert fuzz.still_works(server.url, before) is None

    seen = Counter((operation, mode, status[0]) for operation, mode, status in report.replies)
    document = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    offered = {f"{method.upper()} {path}" for path, methods in document.items() for method in methods}
    tried = {operation for operation, _, _ in seen}
    assert tried == {one for one in offered if one.partition(" ")[2] not in fuzz.EXCLUDED}
    for path in RECURSIVE_PATHS:
        assert seen[f"POST {path}", fuzz.SERVED, "2"], f"{path}: no fuzzed request came through to the model"
        assert seen[f"POST {path}", "negative", "4"]
