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

from deploy.ray.gateway import Gateway, ReplicaLost
from deploy.ray.traffic import ForwardedRequest, ResponseStart
from rtap_core.errors import Overloaded
from rtap_server.http.api_keys import load_keys
from rtap_server.http.auth import AuthMiddleware
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.telemetry.metrics import Metrics
from tests.costs import RUNS, async_cpu_seconds

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
        self.hang, self.release = False, asyncio.Event()

    async def send(self, request: ForwardedRequest, conversation: str) -> AsyncGenerator[ResponseStart | bytes]:
        self.requests.append(request)
        try:
            for step in self.scripts.pop(0):
                if isinstance(step, ReplicaLost):
                    raise step
                yield step
            if self.hang:
                await self.release.wait()
        finally:
            self.closed += 1

    async def broadcast(self, request: ForwardedRequest) -> Mapping[str, tuple[ResponseStart, bytes]]:
        self.requests.append(request)
        if self.hang:
            await self.release.wait()
        return self.everyone


def gateway(fleet: ScriptedFleet, **more: Any) -> ASGIApp:
    return RequestIdMiddleware(bare_gateway(fleet, **more))


def bare_gateway(fleet: ScriptedFleet, **more: Any) -> Gateway:
    return Gateway(fleet, CollectorRegistry(), **{"max_body_bytes": 4096, **more})


async def send_raw(
    app: ASGIApp, messages: Sequence[Message], *, method: str = "POST", path: str = "/v1/chat/completions"
) -> list[Message]:
    """What the app sends to a client whose request arrives as ``messages``, and then nothing more."""
    coming, sent = list(messages), list[Message]()

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
    await app(scope, receive, send)
    return sent


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


@pytest.mark.parametrize("second", [[LOST], [], [JSON, b"half", LOST], [EVENTS, LOST], [EVENTS, EVENT[:9], LOST]])
async def test_a_request_that_ends_two_replicas_is_sent_to_no_third(second: list[Step]) -> None:
    fleet = ScriptedFleet([LOST], second, [JSON, b"{}"])
    reply = await chat(gateway(fleet))
    assert len(fleet.requests) == fleet.closed == 2
    assert (reply.status_code, reply.headers["x-should-retry"]) == (502, "false")  # or SDKs send it twice more
    error = reply.json()["error"]
    assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "server_error")
    assert reply.headers["x-request-id"] in error["message"]


async def test_a_fleet_without_a_free_replica_is_overloaded() -> None:
    class FullFleet(ScriptedFleet):
        async def send(self, request: ForwardedRequest, conversation: str) -> AsyncGenerator[ResponseStart | bytes]:
            self.requests.append(request)
            raise Overloaded("no replica is free; try again in a few seconds")
            yield b""

    reply = await chat(gateway(fleet := FullFleet()))
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
    assert int(reply.headers["retry-after"]) >= 1
    assert len(fleet.requests) == 1


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


PART: Message = {"type": "http.request", "body": b'{"messages": []', "more_body": True}
LEFT: Message = {"type": "http.disconnect"}


@pytest.mark.parametrize("arrived", [[], [PART], [{**PART, "body": b""}], [{**PART, "body": b'{"a": 1}'}], [PART] * 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/rtap/feedback", "/metrics", "/v1/models"])
async def test_an_incomplete_body_goes_nowhere(path: str, arrived: list[Message]) -> None:
    """The client left: nobody is there to answer. Silent past the deadline: an error in the server's shape."""
    fleet = ScriptedFleet()
    assert await send_raw(gateway(fleet), [*arrived, LEFT], path=path) == []
    start, body = await send_raw(gateway(fleet, body_seconds=0.01), arrived, path=path)
    assert (start["status"], json.loads(body["body"])["error"]["type"]) == (408, "timeout_error")
    assert fleet.requests == []


LARGE: Message = {"type": "http.request", "body": b"x" * 600_000, "more_body": True}
END: Message = {"type": "http.request", "body": b"", "more_body": False}


async def test_large_bodies_are_bounded_together_while_their_requests_run() -> None:
    fleet = ScriptedFleet([EVENTS, EVENT])
    fleet.hang = True
    bare = bare_gateway(fleet, max_body_bytes=2**20)
    bare._memory.limit = 2**20
    app = RequestIdMiddleware(bare)
    running = asyncio.create_task(send_raw(app, [LARGE, END]))
    await asyncio.sleep(0.05)
    start, body = await send_raw(app, [LARGE, END])
    assert (start["status"], json.loads(body["body"])["error"]["type"]) == (503, "overloaded_error")
    fleet.release.set()
    assert (await running)[0]["status"] == 200
    assert bare._memory.used == 0


@pytest.mark.parametrize("rest", [[LEFT], [], [LARGE], [END]], ids=["left", "silent", "too large", "answered"])
async def test_no_body_stays_counted(rest: list[Message]) -> None:
    app = bare_gateway(ScriptedFleet([JSON, b"{}"]), max_body_bytes=2**20, body_seconds=0.01)
    await send_raw(RequestIdMiddleware(app), [LARGE, *rest])
    assert app._memory.used == 0


@pytest.mark.parametrize("parts", [1, 5], ids=["at once", "in parts"])
async def test_a_body_that_is_too_large_goes_nowhere(parts: int) -> None:
    fleet = ScriptedFleet()
    sent = await send_raw(gateway(fleet), [{**PART, "body": b"x" * (5000 // parts)}] * parts)
    assert (sent[0]["status"], fleet.requests) == (413, [])
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/live", "/ready"])
@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("POST", 405), ("PUT", 405)])
async def test_no_body_is_read_without_a_key(method: str, path: str, status: int) -> None:
    fleet = ScriptedFleet(everyone={"r1": (JSON, b"{}")})
    assert (await send_raw(gateway(fleet), [], method=method, path=path))[0]["status"] == status
    assert all(request.method == "GET" for request in fleet.requests)


@pytest.mark.parametrize("body", [b"[]," * 100_000, b'["",' * 60_000, b"[" * 100_000, b'{"a":' * 100_000])
async def test_a_body_of_many_values_does_not_stop_the_gateway(body: bytes) -> None:
    """The gateway decodes bodies for stickiness. The replica refuses these with the reason."""
    app = gateway(fleet := ScriptedFleet(*[[JSON, b"{}"]] * RUNS), max_body_bytes=2**20)
    assert await async_cpu_seconds(lambda: call(app, "POST", "/v1/chat/completions", content=body)) < 0.5
    assert fleet.requests[0].body == body


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
    everyone = {"r1": no, "r2": (JSON, b"{}")}
    assert (await call(gateway(ScriptedFleet(everyone=everyone)), "GET", "/ready")).json() == {
        "status": "ready",
        "replicas": 1,
    }
    assert (await call(gateway(ScriptedFleet(everyone={"r1": no})), "GET", "/ready")).status_code == 503
    fleet = ScriptedFleet()
    fleet.hang = True
    assert (await call(gateway(fleet), "GET", "/live")).status_code == 200


async def test_probes_reach_the_replicas_once_a_second_however_many_there_are() -> None:
    now, fleet = [0.0], ScriptedFleet(everyone={"r1": (JSON, b"{}")})
    app = gateway(fleet, clock=lambda: now[0])
    key = {"authorization": "Bearer a-key"}
    for now[0] in (0.0, 0.5, 0.99):
        replies = await asyncio.gather(*(call(app, "GET", "/ready", headers=key) for _ in range(20)))
        assert {reply.status_code for reply in replies} == {200}
    assert [(r.method, r.path, r.headers) for r in fleet.requests] == [("GET", "/ready", ())]
    fleet.everyone, now[0] = {}, 1.0
    assert (await call(app, "GET", "/ready")).status_code == 503
    assert len(fleet.requests) == 2


async def test_a_probe_that_leaves_takes_no_other_with_it() -> None:
    fleet = ScriptedFleet(everyone={"r1": (JSON, b"{}")})
    fleet.hang = True
    app = gateway(fleet)
    leaving, waiting = (asyncio.create_task(call(app, "GET", "/ready")) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    fleet.release.set()
    assert (await waiting).status_code == 200
    assert len(fleet.requests) == 1


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
