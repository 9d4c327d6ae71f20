"""The gate as an ASGI application: what it lets through, what it says to others, what it costs."""

import asyncio
import hashlib
import json
import time
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from rtap_core.types import Judged
from rtap_server.engine.confidence.pooling import PoolingConfidence
from rtap_server.engine.request_state import RequestState, begin_request, current_request, salted_prompt
from rtap_server.http.admission import KeyLimits
from rtap_server.http.api_keys import Key, KeyRing
from rtap_server.http.auth import PROBE_PATHS, AuthMiddleware
from rtap_server.routes import page
from rtap_server.telemetry.metrics import Metrics


class Inner:
    """The application behind the gate. It answers 200, after ``cost`` tokens and once ``go`` is set."""

    def __init__(self, cost: int = 0) -> None:
        self.cost, self.seen, self.salts = cost, [], []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope, receive, send) -> None:
        self.seen.append(scope.get("path"))
        self.salts.append(salted_prompt({"prompt_token_ids": [1]} | scope.get("state", {})).get("cache_salt"))
        current_request().spent_tokens += self.cost
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def key_of(text: str, *, metrics: bool = False, **limits: int) -> Key:
    digest = hashlib.sha256(text.encode()).digest()
    return Key(text, digest, KeyLimits(**limits), opens_metrics_only=metrics)


async def _nowhere(message) -> None:
    """A ``send`` that nobody reads."""


class Door:
    """A gate, its clock and its counters. ``ask`` gives (status, headers, error)."""

    def __init__(self, *keys: Key, cost: int = 0) -> None:
        self.now, self.inner, self.registry = 0.0, Inner(cost), CollectorRegistry()
        self.gate = AuthMiddleware(
            self.inner, keys=KeyRing(keys, None), metrics=Metrics(self.registry), secret=b"s" * 32,
            clock=lambda: self.now, open_paths={*PROBE_PATHS, *page.FILES},
        )  # fmt: skip

    async def ask(self, path="/v1/models", *, method="GET", **headers: str | bytes):
        encoded = [
            (name.replace("_", "-").encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in headers.items()
        ]
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": encoded}
        sent = []

        async def send(message):
            sent.append(message)

        begin_request(RequestState())
        await self.gate(scope, None, send)
        told = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        body = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], told, json.loads(body)["error"] if body else None

    def rejected(self, reason: str) -> float:
        return self.registry.get_sample_value("rtap_rejected_total", {"reason": reason}) or 0.0


async def test_without_a_key_the_answer_is_401_in_openai_shape():
    door = Door(key_of("right"))
    status, headers, error = await door.ask()
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", 401, None)
    assert door.inner.seen == []
    assert door.rejected("unauthorized") == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer right"}, 200),
        ({"authorization": "bearer  right "}, 200),
        ({"x_api_key": "right"}, 200),
        ({"authorization": "Basic cmlnaHQ=", "x_api_key": "right"}, 200),
        ({"authorization": "right"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer wrong", "x_api_key": "right"}, 401),
        ({"authorization": b"Bearer \xff\xc3\x28right"}, 401),
        ({"authorization": b"Bearer " + b"right" * 13_000}, 401),
        ({"x_api_key": "pässword"}, 401),
        ({"x_api_key": ""}, 401),
        ({"host": "x/live?", "x_forwarded_prefix": "/live"}, 401),
    ],
)
async def test_what_counts_as_a_key(headers, status):
    assert (await Door(key_of("right"), key_of("other")).ask(**headers))[0] == status


@pytest.mark.parametrize("path", ["/live", "/ready", "/", "/page/main.js"])
async def test_probes_and_the_page_need_no_key(path):
    assert (await Door(key_of("right")).ask(path))[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/live/", "//live", "/live/../v1/models", "/Live", "/liveness", "/ready?", "/v1/live", "", "/metrics", "*",
        "//", "/page", "/page/", "/page/../v1/models", "/page/main.js/", "/page/other.js", "/index.html",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE"])
async def test_nothing_else_is_a_probe(path, method):
    door = Door(key_of("right"))
    assert (await door.ask(path, method=method))[0] == 401
    assert door.inner.seen == []


async def test_a_websocket_is_closed_before_it_opens():
    door, sent = Door(key_of("right")), []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "root_path": "", "headers": []}
    await door.gate(scope, None, send)
    assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1008)]
    await door.gate(scope | {"headers": [(b"authorization", b"Bearer right")]}, None, send)
    assert door.inner.seen == ["/v1/realtime"]


async def test_the_lifespan_passes():
    door = Door(key_of("right"))
    await door.gate({"type": "lifespan"}, None, _nowhere)
    assert door.inner.seen == [None]


async def test_a_metrics_key_opens_metrics_only_and_then_only_it_does():
    door = Door(key_of("right"), key_of("scrape", metrics=True))
    asked = [(path, key) for path in ("/metrics", "/metrics/", "/v1/models") for key in ("right", "scrape")]
    assert [(await door.ask(path, x_api_key=key))[0] for path, key in asked] == [401, 200, 401, 200, 200, 401]
    assert (await Door(key_of("right")).ask("/metrics", x_api_key="right"))[0] == 200


async def test_requests_a_minute_are_of_each_key_and_of_what_does_work():
    door = Door(key_of("a", requests_per_minute=2), key_of("b", requests_per_minute=2))
    assert [(await door.ask(method="POST", x_api_key="a"))[0] for _ in range(3)] == [200, 200, 429]
    assert (await door.ask(method="POST", x_api_key="b"))[0] == 200
    assert (await door.ask(method="GET", x_api_key="a"))[0] == 200
    status, headers, error = await door.ask(method="POST", x_api_key="a")
    assert (status, headers["retry-after"], error["type"], error["code"]) == (429, "30", "rate_limit_error", 429)
    assert door.rejected("key_limit") == 2
    door.now += 30
    assert (await door.ask(method="POST", x_api_key="a"))[0] == 200


async def test_tokens_that_were_spent_are_waited_for():
    door = Door(key_of("a", tokens_per_minute=60), cost=61)
    assert [(await door.ask(method="POST", x_api_key="a"))[0] for _ in range(2)] == [200, 429]
    door.now += 1
    assert (await door.ask(method="POST", x_api_key="a"))[0] == 200


@pytest.mark.parametrize("leaves", [False, True])
async def test_concurrent_requests_and_a_client_that_leaves_frees_its_place(leaves):
    door = Door(key_of("a", concurrent=1))
    door.inner.go.clear()
    first = asyncio.create_task(door.ask(method="POST", x_api_key="a"))
    await asyncio.sleep(0)
    status, headers, _ = await door.ask(method="POST", x_api_key="a")
    assert (status, headers["retry-after"]) == (429, "1")
    if leaves:
        first.cancel()
    door.inner.go.set()
    await asyncio.gather(first, return_exceptions=True)
    assert (await door.ask(method="POST", x_api_key="a"))[0] == 200


async def test_every_key_has_a_cache_salt_of_its_own_whatever_its_client_says():
    door, other_process = Door(key_of("a"), key_of("b")), Door(key_of("a"))
    other_process.gate._secret = b"t" * 32
    for key in ("a", "a", "b"):
        await door.ask(x_api_key=key)
    await other_process.ask(x_api_key="a")
    first, again, other = door.inner.salts
    assert first == again
    assert len({first, other, *other_process.inner.salts}) == 3
    assert not any(ord(c) < 33 or c in "@/\\" for c in first)
    assert len(first) <= 128  # what vLLM takes

    visits = []
    for key in (b"a", b"b"):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "root_path": "",
            "headers": [(b"x-api-key", key)],
        }
        for state in ({"cache_salt": "own"}, {"cache_salt": first}, {"cache_salt": ""}):
            await door.gate(scope | {"state": state}, None, _nowhere)
        visits.append(door.inner.salts[-3:])
    assert len({*visits[0], *visits[1], first, other}) == 8


async def test_the_generators_cache_is_divided_too():
    """How long a score takes is in the reply, so it must not tell what another key has asked."""
    asked = []

    class Generator:
        async def encode(self, prompt, params, request_id):
            asked.append(prompt)
            yield SimpleNamespace(finished=True, outputs=SimpleNamespace(data=[0.5]))

    scorer = PoolingConfidence(SimpleNamespace(engine=Generator()), 10.0, 100)  # type: ignore[arg-type]
    door = Door(key_of("a"), key_of("b"))

    async def score(scope, receive, send) -> None:
        await scorer.score(Judged([1], [2], [1]))
        await door.inner(scope, receive, send)

    door.gate._app = score
    for key in ("a", "b"):
        assert (await door.ask(x_api_key=key))[0] == 200
    assert [prompt["cache_salt"] for prompt in asked] == door.inner.salts
    begin_request(RequestState())
    await scorer.score(Judged([1], [2], [1]))
    assert asked[-1] == {"prompt_token_ids": [1, 2]}


async def test_without_keys_a_prompt_keeps_the_salt_it_has():
    assert salted_prompt({"prompt_token_ids": [1]}) == {"prompt_token_ids": [1]}
    assert salted_prompt({"cache_salt": "own"}) == {"cache_salt": "own"}


async def test_the_gate_costs_less_than_a_tenth_of_a_millisecond():
    door = Door(*(key_of(f"key-{n}", requests_per_minute=10**9, concurrent=9) for n in range(20)))
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "",
        "headers": [(b"authorization", b"Bearer key-7"), *((b"x-%d" % n, b"v") for n in range(20))],
    }  # fmt: skip

    async def seconds(app) -> float:
        began = time.perf_counter()
        for _ in range(200):
            await app(scope, None, _nowhere)
        return (time.perf_counter() - began) / 200

    added = [await seconds(door.gate) - await seconds(door.inner) for _ in range(10)]
    assert min(added) < 1e-4
