"""One shape for every error: ours, vLLM's, the router's, and those inside a stream."""

import json

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from rtap_core.errors import InvalidRequest, Overloaded, UnknownRequest
from rtap_server.http.errors import install_handlers, shape_error, shape_error_event
from rtap_server.http.request_id import RequestIdMiddleware


class Body(BaseModel):
    n: int
    stop: str | list[str] = ""


def make_app() -> RequestIdMiddleware:
    app = FastAPI()
    install_handlers(app)
    errors = {"400": InvalidRequest("i", param="n"), "503": Overloaded("o"), "404": UnknownRequest("u")}

    @app.post("/body")
    async def body(given: Body): ...

    @app.get("/raise/{name}")
    async def raise_(name: str):
        raise errors[name]

    @app.get("/crash")
    async def crash():
        raise RuntimeError("secret at /srv/models/x.py 0x7f00aa")

    @app.get("/detail")
    async def detail():
        raise HTTPException(418, "no /usr/lib/python3/site.py here")

    @app.get("/text")
    async def text():
        return PlainTextResponse("Traceback: all of it", status_code=502)

    @app.get("/probe")
    async def probe():
        return JSONResponse({"status": "not ready"}, status_code=503)

    @app.get("/anthropic")
    async def anthropic():
        return JSONResponse({"type": "error", "error": {"type": "x", "message": "m"}}, status_code=404)

    return RequestIdMiddleware(app)


@pytest.fixture(scope="module")
def app() -> RequestIdMiddleware:
    return make_app()


async def ask(app, method: str, path: str, **options) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize(
    ("method", "path", "status", "type_", "message"),
    [
        ("GET", "/nowhere", 404, "not_found_error", "Not Found"),
        ("POST", "/raise/400", 405, "invalid_request_error", "Method Not Allowed"),
        ("GET", "/raise/400", 400, "invalid_request_error", "i"),
        ("GET", "/raise/404", 404, "not_found_error", "u"),
        ("GET", "/raise/503", 503, "overloaded_error", "o"),
        ("GET", "/crash", 500, "internal_error", "the server failed on this request"),
        ("GET", "/detail", 418, "invalid_request_error", "no /usr/lib/python3/site.py here"),
        ("GET", "/text", 502, "internal_error", "the server failed on this request"),
    ],
)
async def test_every_error_has_openais_shape(app, method, path, status, type_, message):
    reply = await ask(app, method, path)
    error = reply.json()["error"]
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (type_, status)
    assert error["message"].startswith(message)
    assert "secret" not in reply.text
    assert "0x" not in reply.text
    if status in (500, 502):
        assert error["message"].endswith(f"under request id {reply.headers['x-request-id']}")


async def test_headers_of_an_error_stay(app):
    assert "GET" in (await ask(app, "DELETE", "/probe")).headers["allow"]
    assert (await ask(app, "GET", "/raise/503")).headers["retry-after"] == "1"


async def test_what_is_no_error_stays(app):
    assert (await ask(app, "GET", "/probe")).json() == {"status": "not ready"}


async def test_an_anthropic_error_can_be_read_by_both(app):
    shown = (await ask(app, "GET", "/anthropic")).json()
    assert shown == {"type": "error", "error": {"message": "m", "type": "x", "param": None, "code": 404}}


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"n": "my value"}, "n", "n='my value': Input should be a valid integer"),
        ({"n": 1, "stop": ["a", 5]}, "stop.1", "stop.1=5: Input should be a valid string"),
        ({"n": "x" * 5000}, "n", "n='" + "x" * 95),
        ([], None, "Input should be a valid dictionary"),
    ],
)
async def test_an_invalid_body_is_refused_with_field_value_and_rule(app, body, param, sentence):
    reply = await ask(app, "POST", "/body", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(sentence)
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", None),
        (b'{"status": "dead"}', None),
        (b"[1]", None),
        (b'{"error": "words"}', "words"),
        (b'{"error": {"message": ["no", "text"]}}', "Bad Request"),
        (b'{"detail": [{"input": "x"}]}', "Bad Request"),
        (b"<html>", "Bad Request"),
        (json.dumps({"error": {"message": "x" * 5000, "type": "t"}}).encode(), "x" * 1000),
    ],
)
def test_shapes_of_others(body, expected):
    shaped = shape_error(400, body, "id-1")
    assert (shaped and json.loads(shaped)["error"]["message"]) == expected


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        ({"message": "See stack trace (above)", "type": "InternalServerError", "code": 500}, "the server failed", 500),
        (
            {"message": "list index in /usr/lib/x.py", "type": "BadRequestError", "code": 400},
            "list index in /usr/lib/x.py",
            400,
        ),
        ({"message": "m"}, "the server failed", 500),
        ({"message": "m", "code": "strange"}, "the server failed", 500),
    ],
)
def test_an_error_event_of_a_stream_tells_nothing_of_the_inside(error, message, code):
    shown = json.loads(shape_error_event(json.dumps({"error": error}).encode(), "id-1"))["error"]
    assert set(shown) == {"message", "type", "param", "code"}
    assert shown["message"].startswith(message)
    assert shown["code"] == code
