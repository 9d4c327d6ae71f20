"""The gateway over scripted replicas: what is asked again, what a client sees when a replica dies, keys, abort."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message

from deploy.ray.gateway import Gateway, ReplicaLost, RetryPolicy
from deploy.ray.traffic import ForwardedRequest, ResponseStart
from rtap_server.http.api_keys import load_keys
from rtap_server.http.auth import AuthMiddleware
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.telemetry.metrics import Metrics

JSON, EVENTS = (
    ResponseStart(200, ((b"content-type", b"application/json"),)),
    ResponseStart(200, ((b"content-type", b"text/event-stream"),)),
)
LOST = ReplicaLost("gone")
Step = ResponseStart | bytes | ReplicaLost
EVENT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'


class ScriptedFleet:
    """Gives the next script at each asking; an exception in it is raised there."""

    def __init__(
        self, *scripts: Sequence[Step], everyone: Mapping[str, tuple[ResponseStart, bytes]] | None = None
    ) -> None:
        self.scripts, self.everyone = list(scripts), everyone or {}
        self.requests: list[ForwardedRequest] = []
        self.closed = 0
        self.hang = False

    async def send(self, request: ForwardedRequest, conversation: str) -> AsyncGenerator[ResponseStart | bytes]:
        self.requests.append(request)
        try:
            for step in self.scripts.pop(0):
                if isinstance(step, ReplicaLost):
                    raise step
                yield step
            if self.hang:
                await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def broadcast(self, request: ForwardedRequest) -> Mapping[str, tuple[ResponseStart, bytes]]:
        self.requests.append(request)
        if self.hang:
            await asyncio.Event().wait()
        return self.everyone


def gateway(fleet: ScriptedFleet, **more: Any) -> ASGIApp:
    return RequestIdMiddleware(bare_gateway(fleet, **more))


def bare_gateway(fleet: ScriptedFleet, **more: Any) -> Gateway:
    quick = RetryPolicy(attempts=3, pause_seconds=0.001, ready_seconds=0.05)
    return Gateway(fleet, CollectorRegistry(), **{"max_body_bytes": 4096, "retry_policy": quick, **more})


async def call(app: ASGIApp, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://rtap") as client:
        return await client.request(method, path, **more)


async def chat(app: ASGIApp, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    return await call(app, "POST", path, json={"messages": []}, **more)


async def test_a_reply_comes_back_as_the_replica_gave_it() -> None:
    head = ResponseStart(418, ((b"content-type", b"application/json"), (b"retry-after", b"7"), (b"x-request-id", b"r")))
    fleet = ScriptedFleet([head, b'{"a":', b" 1}"])
    reply = await call(gateway(fleet), "POST", "/v1/x?y=1", content=b"body", headers={"authorization": "Bearer k"})
    assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (418, {"a": 1}, "7")
    (request,) = fleet.requests
    assert (request.method, request.path, request.query, request.body) == ("POST", "/v1/x", b"y=1", b"body")
    assert (b"authorization", b"Bearer k") in request.headers


@pytest.mark.parametrize(
    "first",
    [[LOST], [], [JSON, b'{"half', LOST], [EVENTS, LOST], [EVENTS, EVENT[:9], LOST]],
    ids=["before the head", "without a word", "in a body", "in a stream, before an event", "in its first event"],
)
async def test_what_the_client_has_not_seen_is_asked_again(first: list[Step]) -> None:
    is_stream = EVENTS in first
    fleet = ScriptedFleet(first, [EVENTS, EVENT, b"data: [DONE]\n\n"] if is_stream else [JSON, b"{}"])
    app = gateway(fleet)
    reply = await chat(app)
    assert reply.status_code == 200
    assert reply.content == (EVENT + b"data: [DONE]\n\n" if is_stream else b"{}")
    assert len(fleet.requests) == fleet.closed == 2
    ids = [dict(request.headers)[b"x-request-id"] for request in fleet.requests]
    assert ids[0] == ids[1]
    assert 'rtap_gateway_retries_total{replica="gateway"} 1.0' in (await call(app, "GET", "/metrics")).text


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/chat/completions", b"\n\ndata: [DONE]\n\n"),
        ("/v1/messages", b"\n\n"),
        ("/v1/responses", b"\n\n"),
    ],
)
async def test_a_stream_that_has_begun_ends_with_an_error_and_no_half_event(path: str, end: bytes) -> None:
    fleet = ScriptedFleet([EVENTS, EVENT + EVENT[:20], LOST])
    app = gateway(fleet)
    reply = await chat(app, path)
    assert reply.content.startswith(EVENT)
    last = reply.content.removeprefix(EVENT)
    assert last.endswith(end)
    told = json.loads(last.split(b"data: ")[1].split(b"\n\n")[0])
    assert "send the request again" in json.dumps(told)
    assert (told.get("type") == "error") is (path != "/v1/chat/completions")
    assert len(fleet.requests) == 1
    assert 'rtap_gateway_broken_streams_total{replica="gateway"} 1.0' in (await call(app, "GET", "/metrics")).text


async def test_where_every_replica_is_lost_the_client_is_told_when_to_come_again() -> None:
    fleet = ScriptedFleet([LOST], [LOST], [LOST])
    reply = await chat(gateway(fleet))
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
    assert int(reply.headers["retry-after"]) >= 1


async def test_a_client_that_leaves_aborts_its_request() -> None:
    fleet = ScriptedFleet([EVENTS, EVENT])
    fleet.hang = True
    sent: list[Message] = []
    seen = asyncio.Event()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)
        if message.get("body"):
            seen.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    task = asyncio.create_task(gateway(fleet)(scope, receive, send))
    await seen.wait()
    assert fleet.closed == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert fleet.closed == 1
    assert [m.get("body") for m in sent[1:]] == [EVENT]


async def test_a_body_that_is_too_large_goes_nowhere() -> None:
    fleet = ScriptedFleet()
    reply = await call(gateway(fleet), "POST", "/v1/chat/completions", content=b"x" * 5000)
    assert (reply.status_code, fleet.requests) == (413, [])


async def test_feedback_reaches_the_replica_that_remembers() -> None:
    not_mine = (ResponseStart(404, JSON.headers), b'{"error": 1}')
    fleet = ScriptedFleet(everyone={"r1": not_mine, "r2": (JSON, b'{"ok": 1}'), "r3": not_mine})
    reply = await call(gateway(fleet), "POST", "/v1/rtap/feedback", json={"request_id": "x", "correct": True})
    assert (reply.status_code, reply.json()) == (200, {"ok": 1})
    fleet.everyone = {"r1": not_mine}
    assert (await call(gateway(fleet), "POST", "/v1/rtap/feedback", json={})).status_code == 404
    fleet.everyone = {}
    assert (await call(gateway(fleet), "POST", "/v1/rtap/feedback", json={})).status_code == 503


async def test_it_is_ready_while_one_replica_is_and_live_always() -> None:
    no = (ResponseStart(503), b"")
    fleet = ScriptedFleet(everyone={"r1": no, "r2": (JSON, b"{}")})
    assert (await call(gateway(fleet), "GET", "/ready")).json() == {"status": "ready", "replicas": 1}
    fleet.everyone = {"r1": no}
    assert (await call(gateway(fleet), "GET", "/ready")).status_code == 503
    fleet.hang = True
    assert (await call(gateway(fleet), "GET", "/ready")).status_code == 503
    assert (await call(gateway(fleet), "GET", "/live")).status_code == 200


async def test_metrics_that_replicas_refuse_are_refused() -> None:
    fleet = ScriptedFleet(everyone={"r1": (ResponseStart(401, JSON.headers), b'{"error": 1}')})
    assert (await call(gateway(fleet), "GET", "/metrics")).status_code == 401


KEYS = """
[[keys]]
name = "team"
key = "team-key"
tokens_per_minute = 100
[[keys]]
name = "scraper"
key = "metrics-key"
scope = "metrics"
"""


async def test_keys_count_for_the_whole_fleet(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEYS, encoding="utf-8")
    cycle = {"tokens": 80, "prompt_tokens": 60, "cached_tokens": 32}
    costly = json.dumps({"rtap": {"cycles": [cycle], "discarded_tokens": 0}}).encode()
    streamed = b"data: " + costly + b"\n\n"
    fleet = ScriptedFleet([JSON, costly], [EVENTS, streamed])
    for _ in range(2):  # a whole reply and a stream, each by a fresh account
        keys = load_keys(tmp_path / "keys.toml", {})
        metrics = Metrics(CollectorRegistry())
        app = RequestIdMiddleware(AuthMiddleware(bare_gateway(fleet), keys=keys, metrics=metrics, secret=b"s"))
        assert (await chat(app)).status_code == 401
        assert (await chat(app, headers={"authorization": "Bearer team-key"})).status_code == 200
        refused = await chat(app, headers={"x-api-key": "team-key"})  # 108 of 100 tokens are spent
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert (await call(app, "GET", "/metrics", headers={"x-api-key": "team-key"})).status_code == 401
        assert (await call(app, "GET", "/metrics", headers={"x-api-key": "metrics-key"})).status_code == 200
    assert fleet.scripts == []
