"""Request ids in and out, and one state for each request."""

import logging
import re

import pytest

from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.http.request_id import RequestIdMiddleware
from tests.server.http.test_errors import ask, make_app
from tests.server.live import exchange as over_a_socket
from tests.server.live import serving


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
