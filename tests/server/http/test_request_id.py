"""Request ids in and out, and one state for each request."""

import asyncio
import json
import logging
import re
import threading
import time

import pytest
from starlette.responses import StreamingResponse

from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.http.request_id import SINGULAR_HEADERS, RequestIdMiddleware
from tests.error_shapes import error_of
from tests.server.http.test_errors import ask, make_app
from tests.server.live import connect, serving
from tests.server.live import exchange as over_a_socket


@pytest.fixture(scope="module")
def app() -> RequestIdMiddleware:
    return make_app()


@pytest.mark.parametrize("path", ["/probe", "/nowhere", "/crash", "/body"])
@pytest.mark.parametrize(
    ("given", "is_kept"),
    [(["a.good-ID_1"], True), (["x" * 64], True), (["x" * 65], False), ([""], False), (["a b"], False), ([], False),
     (["é"], False), (["a\tb"], False), (["one", "two"], False), (["../../x"], False)],
)  # fmt: skip
async def test_a_request_id_comes_back_on_every_reply(app, path, given, is_kept):
    reply = await ask(app, "GET", path, headers=[("x-request-id", value.encode()) for value in given])
    (found,) = reply.headers.get_list("x-request-id")
    assert found == given[0] if is_kept else re.fullmatch("[0-9a-f]{32}", found)


async def test_the_application_sees_the_id_in_the_state_alone():
    """vLLM would take the header for its engine ids, and abort every request with the same id."""
    seen = []

    async def inner(scope, receive, send):
        seen.append((current_request().request_id, [v for k, v in scope["headers"] if k == b"x-request-id"]))

    for headers in ([(b"x-request-id", b"bad id"), (b"x-request-id", b"b")], [(b"x-request-id", b"good")]):
        await RequestIdMiddleware(inner)({"type": "http", "headers": headers}, None, None)
    assert re.fullmatch("[0-9a-f]{32}", seen[0][0])
    assert seen == [(seen[0][0], []), ("good", [])]


async def test_the_lifespan_passes_unchanged():
    seen = []

    async def inner(scope, receive, send):
        seen.append((scope, send))

    scope = {"type": "lifespan", "headers": [(b"x-request-id", b"good")]}
    await RequestIdMiddleware(inner)(scope, None, print)
    assert seen == [(scope, print)]


async def test_a_failure_is_logged_with_class_message_frames_and_id(app, caplog):
    reply = await ask(app, "GET", "/crash", headers={"x-request-id": "id-7"})
    assert "id-7" in reply.json()["error"]["message"]
    (record,) = [record for record in caplog.records if record.name == "rtap.errors"]
    assert record.getMessage() == "request id-7 failed"
    text = logging.Formatter().format(record)
    assert "RuntimeError: secret at /srv" in text
    assert "in crash" in text


async def test_a_failure_that_the_engine_has_logged_is_not_logged_again(caplog):
    async def inner(scope, receive, send):
        current_request().is_failure_logged = True
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await RequestIdMiddleware(inner)({"type": "http", "headers": []}, None, None)
    assert not [record for record in caplog.records if record.name == "rtap.errors"]


def test_a_state_is_not_inherited_by_the_next_request_of_a_connection():
    """uvicorn starts a pipelined request in the context of the request before it."""
    seen = []

    async def inner(scope, receive, send):
        seen.append(current_request().num_choices)
        begin_request(RequestState(num_choices=len(seen)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    one, last = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with serving(inner) as port:
        over_a_socket(port, one + one + last)
    assert seen == [0, 1, 2]  # inherited without the middleware
    seen.clear()
    with serving(RequestIdMiddleware(inner)) as port:
        assert over_a_socket(port, one + one + last).count(b"200 OK") == 3
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(SINGULAR_HEADERS))
@pytest.mark.parametrize("values", [(b"a", b"b"), (b"a", b"a"), (b"a", b"")])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/live"])
async def test_a_header_with_one_value_that_is_given_twice_is_refused(name, values, path):
    """One reader of it would take the first, another the last."""
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope)

    headers = [(b"x-request-id", b"id-7"), (b"accept", b"a"), (b"accept", b"b"), *((name, value) for value in values)]
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": headers}
    await RequestIdMiddleware(inner)(scope, None, send)
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"x-request-id"]) == (400, b"id-7")
    assert f"the header {name.decode()} is given 2 times" in error_of(path, json.loads(sent[1]["body"]))["message"]
    assert seen == []
    await RequestIdMiddleware(inner)({**scope, "headers": headers[:-1]}, None, send)
    assert len(seen) == 1


def streaming(parts, seen):
    """An application that streams, as vLLM's routes do, and reports how its stream has ended."""

    async def body():
        seen["began"] = time.monotonic()
        try:
            async for part in parts():
                yield part
            seen["end"] = "complete"
        except (asyncio.CancelledError, GeneratorExit):
            seen["end"] = "left"
            raise
        finally:
            seen["seconds"] = time.monotonic() - seen["began"]

    async def app(scope, receive, send):
        headers = {"cache-control": "max-age=3600"}
        await StreamingResponse(body(), media_type="text/event-stream", headers=headers)(scope, receive, send)
        seen["returned"] = True

    return app


def test_streams_tell_caches_and_proxies_to_pass_each_event():
    async def parts():
        yield b"data: 1\n\n"

    with serving(RequestIdMiddleware(streaming(parts, {}))) as port:
        reply = over_a_socket(port, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").lower()
    assert reply.count(b"cache-control: no-cache\r\n") == reply.count(b"cache-control:") == 1
    assert b"\r\nx-accel-buffering: no\r\n" in reply


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_reads_nothing_is_treated_as_gone_and_a_slow_one_is_not(reads, caplog):
    caplog.set_level(logging.WARNING, "rtap.errors")
    seen, stop = {}, threading.Event()
    stall = 2.0 if reads else 0.6  # a reader on a busy machine may pause for half a second

    async def parts():
        while not stop.is_set():
            yield b"data: " + b"x" * 65536 + b"\n\n"
            await asyncio.sleep(0)

    with serving(RequestIdMiddleware(streaming(parts, seen), stall_seconds=stall)) as port, connect(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-request-id: id-7\r\n\r\n")
        until = time.monotonic() + (5 if reads else 10)
        while "end" not in seen and time.monotonic() < until:
            time.sleep(0.05)
            if reads:
                sock.recv(2**20)
        if reads:
            assert "end" not in seen
            stop.set()
            return
        assert seen["end"] == "left"  # at once, and not when its garbage is collected
        assert 0.5 < seen["seconds"] < 5
        time.sleep(0.1)
        assert seen["returned"]
    assert "request id-7 ended: its client read nothing for 0.6 s" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_cancellation_from_elsewhere_is_not_taken_for_a_stalled_client():
    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await asyncio.sleep(60)

    async def send(message): ...

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    task = asyncio.create_task(RequestIdMiddleware(inner)(scope, None, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
