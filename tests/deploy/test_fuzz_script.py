"""The fuzzer finds problems in single replies and in a faulty server."""

import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from rtap_server.http.errors import error_type
from tests.server.live import serving
from tests.stress import fuzz

ID = {"x-request-id": "1"}


def error(message: str, status: int = 400, **more) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": error_type(status), "param": None, "code": None} | more}
    ).encode()


@pytest.mark.parametrize(
    ("status", "headers", "content", "problem"),
    [
        (200, ID, b"{}", None),
        (200, ID, b'data: {"choices":[]}\n\ndata: [DONE]\n\n', None),
        (200, ID, b"data: " + error("slow down", 429) + b"\n\n", None),
        (200, ID, b"data: " + error("broke", 500) + b"\n\n", "a stream failed"),
        (400, ID, error("n is 17"), None),
        (400, {}, error("n is 17"), "no x-request-id"),
        (500, ID, error("sorry", 500), "a server error"),
        (404, ID, b'{"detail": "Not Found"}', "no error object"),
        (404, ID, b"<html>", "no error object"),
        (400, ID, error("n is 17", hint="x"), "no API's shape"),
        (400, ID, error("n is 17", code=400), "no API's shape"),
        (400, ID, b'{"type": "error", "error": {"type": "t", "message": "m"}, "request_id": "1"}', None),
        (400, ID, b'{"type": "error", "error": {"type": "t", "message": "m"}}', "no API's shape"),
        (400, ID, error("<Request object at 0x7f1f0a580210>"), "leaks internals"),
        (400, ID, error("no such file /usr/lib/x"), "leaks internals"),
        (400, ID, error('Traceback (most recent call last)'), "leaks internals"),
    ],
)  # fmt: skip
def test_what_a_reply_must_not_be(status, headers, content, problem):
    found = fuzz.problem_of(status, headers, content)
    assert found is None if problem is None else problem in (found or "")


def test_an_error_may_quote_the_request():
    content = error("path='/usr/lib/x': no such file")
    assert fuzz.problem_of(400, ID, content, "body={'path': '/usr/lib/x'}") is None
    assert fuzz.problem_of(400, ID, content, "body={'path': '/x'}")


class Ask(BaseModel):
    """A request of the server below."""

    count: int = Field(ge=0)


@pytest.fixture
def faulty() -> Iterator[str]:
    """A server that fails on every odd count, and on nothing else."""
    app = FastAPI()

    @app.post("/ask")
    def take(ask: Ask) -> JSONResponse:
        return JSONResponse({}, 500 if ask.count % 2 else 200, ID)

    @app.exception_handler(422)
    @app.exception_handler(400)
    def refuse(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(json.loads(error("wrong")), 400, ID)

    from fastapi.exceptions import RequestValidationError

    app.add_exception_handler(RequestValidationError, refuse)
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_a_fault_is_found_with_the_body_that_shows_it(faulty):
    report = fuzz.fuzz(faulty, seconds=0, examples=20, seed=0, log_line=lambda _: None)
    assert report.findings
    assert {(found.operation, found.mode) for found in report.findings} == {("POST /ask", "positive")}
    assert all("500: a server error" in found.problem and "'count': " in found.request for found in report.findings)
    assert report.replies["POST /ask", "negative", "400"] > 5


@pytest.mark.parametrize("path", list(fuzz.EXCLUDED))
def test_what_is_left_out_has_a_reason(path):
    assert len(fuzz.EXCLUDED[path]) > 20
