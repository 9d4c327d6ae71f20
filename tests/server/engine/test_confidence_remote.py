"""A generator on another server, over a transport that answers by script; tests/e2e has a real one."""

import asyncio

import httpx
import pytest
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence.remote import RemoteConfidence
from rtap_server.engine.request_state import RequestState, begin_request

JUDGED = Judged([1, 2], [3], [1, 2])


async def score(answer, timeout_seconds: float = 1.0) -> Score:
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        return await RemoteConfidence("http://generator/", timeout_seconds, client).score(JUDGED)


async def test_its_answer_is_waited_for_as_long_as_the_setting_says_and_no_less():
    """httpx would give up a read after five seconds by itself."""
    limits = []

    async def late(request: httpx.Request) -> httpx.Response:
        limits.append(request.extensions["timeout"])
        await asyncio.sleep(0.1)
        return httpx.Response(200, json={"data": [{"probs": [0.9]}]})

    assert await score(late) == Score(0.9, 3)
    assert set(limits[0].values()) == {None}
    with pytest.raises(ConfidenceError, match="timed out"):
        await score(late, 0.05)


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(500),
        httpx.Response(200, text="no JSON"),
        httpx.Response(200, json={"data": []}),
        httpx.Response(200, json={"data": [{"probs": [1.5]}]}),
    ],
    ids=["status", "text", "empty", "no probability"],
)
async def test_a_wrong_answer_is_no_score(reply):
    with pytest.raises(ConfidenceError):
        await score(lambda _: reply)


async def test_the_prefix_caches_of_keys_are_kept_apart_on_the_remote_server():
    salts = []

    async def answer(request: httpx.Request) -> httpx.Response:
        salts.append(ClassificationCompletionRequest.model_validate_json(request.content).cache_salt)
        return httpx.Response(200, json={"data": [{"probs": [0.9]}]})

    for owner in (b"", b"one", b"two", b"one"):
        begin_request(RequestState(owner=owner))
        await score(answer)
    assert salts[0] is None
    assert salts[1] == salts[3] != salts[2]
