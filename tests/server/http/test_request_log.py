"""One JSON line a request: its fields, its id, and what is never in it."""

import json
import logging
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from pythonjsonlogger.json import JsonFormatter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.http.request_log import RequestLogMiddleware
from rtap_server.telemetry.logs import REQUESTS
from tests.server.http.test_recursion_fields import _trajectory


@pytest.fixture
def log() -> Iterator[StringIO]:
    """What the log of requests has, with the formatter that `--log-format json` puts there."""
    text, logger = StringIO(), logging.getLogger(REQUESTS)
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s"))
    before, factory = logger.level, logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)  # not vLLM's, where another test has imported it
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield text
    logging.setLogRecordFactory(factory)
    logger.removeHandler(handler)
    logger.setLevel(before)


def _client(num_choices: int = 0, **options: Any) -> TestClient:
    async def chat(request: Request) -> PlainTextResponse:
        state = current_request()
        state.key_name, state.model = "team", "served"
        if num_choices:
            state.reserve_choices(num_choices)
            state.trajectories[0] = _trajectory()
        return PlainTextResponse(state.request_id, headers={"seen": request.headers.get("x-request-id", "")})

    async def fail(request: Request) -> PlainTextResponse:
        raise RuntimeError("zebra")

    async def show(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", status_code=503 if "dead" in request.url.query else 200)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]), Route("/fail", fail), Route("/live", show),
        Route("/item/{name}", show),
    ]  # fmt: skip
    app = Starlette(routes=routes, middleware=[Middleware(RequestLogMiddleware, logs=True, **options)])
    return TestClient(RequestIdMiddleware(app), raise_server_exceptions=False)


def _told(log: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_finished_request_is_one_line(log):
    done = _trajectory()
    trace = "0af7651916cd43dd8448eb211c80319c"  # pragma: allowlist secret
    headers = {"x-request-id": "a.b-c_1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    reply = _client(2).post("/v1/chat/completions", headers=headers, content=b"zebra")
    (line,) = _told(log)
    assert reply.headers.get_list("x-request-id") == ["a.b-c_1"]
    assert line.pop("seconds") > 0
    assert line == {
        "levelname": "INFO", "name": "rtap.requests", "message": "POST /v1/chat/completions 200",
        "request_id": "a.b-c_1", "method": "POST", "route": "/v1/chat/completions", "status": 200, "key": "team",
        "trace_id": trace, "model": "served", "choices": 2, "policy": "confidence",
        "stop_reason": "abandoned,threshold",  # one choice of two was finished
        "cycles": 2, "prompt_tokens": done.cycles[0].prompt_tokens, "tokens": sum(c.tokens for c in done.cycles),
        "reasoning_tokens": sum(c.tokens for c in done.cycles) - done.cycles[1].answer_tokens, "oops_tokens": 2,
        "discarded_tokens": done.discarded_tokens, "confidence": done.confidence, "selected_cycle": 1,
        "first_answer_seconds": done.first_answer_seconds,
    }  # fmt: skip


@pytest.mark.parametrize("given", [None, "", "x y", "é", 'a"b', "x" * 129])
def test_an_id_that_is_missing_or_no_plain_word_is_made(log, given):
    headers = {} if given is None else {"x-request-id": given.encode()}
    reply = _client().post("/v1/chat/completions", headers=headers)
    (line,) = _told(log)
    assert len(line["request_id"]) == 32
    assert reply.text == reply.headers["x-request-id"] == line["request_id"]
    assert reply.headers["seen"] == ""  # vLLM would make it part of its engine ids


@pytest.mark.parametrize(
    ("path", "status", "route"),
    [
        ("/item/zebra?key=zebra", 200, "/item/{name}"),
        ("/zebra", 404, "unknown"),
        ("/fail", 500, "/fail"),
        ("/live?dead", 503, "/live"),
    ],
)
def test_of_a_path_only_its_route_is_told(log, path, status, route):
    assert _client().get(path).status_code == status
    (line,) = _told(log)
    assert (line["status"], line["route"]) == (status, route)
    assert "zebra" not in log.getvalue()


def test_probes_that_succeed_and_quiet_routes_are_not_told(log):
    client = _client(quiet_routes=["/item/{name}"])
    client.get("/live")
    client.get("/item/x")
    assert not log.getvalue()


async def test_a_client_that_left_before_its_reply_is_told_as_such(log):
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    begin_request(RequestState())
    scope = {"type": "http", "method": "POST", "path": "/v1/messages", "root_path": "", "headers": []}
    await RequestLogMiddleware(app, logs=True)(scope, None, None)  # type: ignore[arg-type]
    (line,) = _told(log)
    assert (line["status"], line["route"]) == (499, "/v1/messages")
