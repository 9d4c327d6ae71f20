"""AuthMiddleware as an ASGI application: keys, limits, cache salts, cost."""

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
    """The application inside the middleware. It answers 200, after ``cost`` tokens and once ``go`` is set."""

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


class Guarded:
    """The middleware with its clock and counters. ``ask`` returns (status, headers, error)."""

    def __init__(self, *keys: Key, cost: int = 0) -> None:
        self.now, self.inner, self.registry = 0.0, Inner(cost), CollectorRegistry()
        self.app = AuthMiddleware(
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
        await self.app(scope, None, send)
        told = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        body = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], told, json.loads(body)["error"] if body else None

    def rejected(self, reason: str) -> float:
        return self.registry.get_sample_value("rtap_rejected_total", {"reason": reason}) or 0.0


async def test_without_a_key_the_answer_is_401_in_openai_shape():
    guarded = Guarded(key_of("right"))
    status, headers, error = await guarded.ask()
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert guarded.inner.seen == []
    assert guarded.rejected("unauthorized") == 1


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
    assert (await Guarded(key_of("right"), key_of("other")).ask(**headers))[0] == status


@pytest.mark.parametrize("path", ["/live", "/ready", "/", "/page/main.js"])
async def test_probes_and_the_page_need_no_key(path):
    assert (await Guarded(key_of("right")).ask(path))[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/live/", "//live", "/live/../v1/models", "/Live", "/liveness", "/ready?", "/v1/live", "", "/metrics", "*",
        "//", "/page", "/page/", "/page/../v1/models", "/page/main.js/", "/page/other.js", "/index.html",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE"])
async def test_nothing_else_is_a_probe(path, method):
    guarded = Guarded(key_of("right"))
    assert (await guarded.ask(path, method=method))[0] == 401
    assert guarded.inner.seen == []


async def test_a_websocket_is_closed_before_it_opens():
    guarded, sent = Guarded(key_of("right")), []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "root_path": "", "headers": []}
    await guarded.app(scope, None, send)
    assert [(m["type"], m["code"]) for m in sent] == [("websocket.close", 1008)]
    await guarded.app(scope | {"headers": [(b"authorization", b"Bearer right")]}, None, send)
    assert guarded.inner.seen == ["/v1/realtime"]


async def test_the_lifespan_passes():
    guarded = Guarded(key_of("right"))
    await guarded.app({"type": "lifespan"}, None, _nowhere)
    assert guarded.inner.seen == [None]


async def test_a_metrics_key_opens_metrics_only_and_then_only_it_does():
    guarded = Guarded(key_of("right"), key_of("scrape", metrics=True))
    asked = [(path, key) for path in ("/metrics", "/metrics/", "/v1/models") for key in ("right", "scrape")]
    assert [(await guarded.ask(path, x_api_key=key))[0] for path, key in asked] == [401, 200, 401, 200, 200, 401]
    assert (await Guarded(key_of("right")).ask("/metrics", x_api_key="right"))[0] == 200


async def test_requests_a_minute_are_of_each_key_and_of_what_does_work():
    guarded = Guarded(key_of("a", requests_per_minute=2), key_of("b", requests_per_minute=2))
    assert [(await guarded.ask(method="POST", x_api_key="a"))[0] for _ in range(3)] == [200, 200, 429]
    assert (await guarded.ask(method="POST", x_api_key="b"))[0] == 200
    assert (await guarded.ask(method="GET", x_api_key="a"))[0] == 200
    status, headers, error = await guarded.ask(method="POST", x_api_key="a")
    assert (status, headers["retry-after"], error["type"]) == (429, "30", "rate_limit_error")
    assert error["code"] == "rate_limit_exceeded"
    assert guarded.rejected("key_limit") == 2
    guarded.now += 30
    assert (await guarded.ask(method="POST", x_api_key="a"))[0] == 200


async def test_tokens_that_were_spent_are_waited_for():
    guarded = Guarded(key_of("a", tokens_per_minute=60), cost=61)
    assert [(await guarded.ask(method="POST", x_api_key="a"))[0] for _ in range(2)] == [200, 429]
    guarded.now += 1
    assert (await guarded.ask(method="POST", x_api_key="a"))[0] == 200


@pytest.mark.parametrize("leaves", [False, True])
async def test_concurrent_requests_and_a_client_that_leaves_frees_its_place(leaves):
    guarded = Guarded(key_of("a", concurrent=1))
    guarded.inner.go.clear()
    first = asyncio.create_task(guarded.ask(method="POST", x_api_key="a"))
    await asyncio.sleep(0)
    status, headers, _ = await guarded.ask(method="POST", x_api_key="a")
    assert (status, headers["retry-after"]) == (429, "1")
    if leaves:
        first.cancel()
    guarded.inner.go.set()
    await asyncio.gather(first, return_exceptions=True)
    assert (await guarded.ask(method="POST", x_api_key="a"))[0] == 200


async def test_every_key_has_a_cache_salt_of_its_own_whatever_its_client_says():
    guarded, other_process = Guarded(key_of("a"), key_of("b")), Guarded(key_of("a"))
    other_process.app._secret = b"t" * 32
    for key in ("a", "a", "b"):
        await guarded.ask(x_api_key=key)
    await other_process.ask(x_api_key="a")
    first, again, other = guarded.inner.salts
    assert first == again
    assert len({first, other, *other_process.inner.salts}) == 3
    assert not any(ord(c) < 33 or c in "@/\\" for c in first)
    assert len(first) <= 128  # what vLLM takes

    salts = []
    for key in (b"a", b"b"):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "root_path": "",
            "headers": [(b"x-api-key", key)],
        }
        for state in ({"cache_salt": "own"}, {"cache_salt": first}, {"cache_salt": ""}):
            await guarded.app(scope | {"state": state}, None, _nowhere)
        salts.append(guarded.inner.salts[-3:])
    assert len({*salts[0], *salts[1], first, other}) == 8


async def test_the_generators_cache_is_divided_too():
    """How long a score takes is in the reply, so it must not tell what another key has asked."""
    asked = []

    class Generator:
        async def encode(self, prompt, params, request_id):
            asked.append(prompt)
            yield SimpleNamespace(finished=True, outputs=SimpleNamespace(data=[0.5]))

    scorer = PoolingConfidence(SimpleNamespace(engine=Generator()), 10.0, 100)  # type: ignore[arg-type]
    guarded = Guarded(key_of("a"), key_of("b"))

    async def score(scope, receive, send) -> None:
        await scorer.score(Judged([1], [2], [1]))
        await guarded.inner(scope, receive, send)

    guarded.app._app = score
    for key in ("a", "b"):
        assert (await guarded.ask(x_api_key=key))[0] == 200
    assert [prompt["cache_salt"] for prompt in asked] == guarded.inner.salts
    begin_request(RequestState())
    await scorer.score(Judged([1], [2], [1]))
    assert asked[-1] == {"prompt_token_ids": [1, 2]}


async def test_without_keys_a_prompt_keeps_the_salt_it_has():
    begin_request(RequestState())
    assert salted_prompt({"prompt_token_ids": [1]}) == {"prompt_token_ids": [1]}
    assert salted_prompt({"cache_salt": "own"}) == {"cache_salt": "own"}


async def test_authentication_costs_less_than_a_tenth_of_a_millisecond():
    guarded = Guarded(*(key_of(f"key-{n}", requests_per_minute=10**9, concurrent=9) for n in range(20)))
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "",
        "headers": [(b"authorization", b"Bearer key-7"), *((b"x-%d" % n, b"v") for n in range(20))],
    }  # fmt: skip

    async def seconds(app) -> float:
        began = time.perf_counter()
        for _ in range(200):
            await app(scope, None, _nowhere)
        return (time.perf_counter() - began) / 200

    added = [await seconds(guarded.app) - await seconds(guarded.inner) for _ in range(10)]
    assert min(added) < 1e-4
