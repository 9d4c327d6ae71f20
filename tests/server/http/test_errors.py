"""One shape for every error: ours, vLLM's, the router's, and those inside a stream."""

import json
import logging

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rtap_core import errors
from rtap_core.errors import InvalidRequest, Overloaded, RtapError, UnknownRequest
from rtap_server.engine.request_state import RequestState, begin_request
from rtap_server.http.errors import (
    STATUS,
    _invalid,
    error_response,
    error_type,
    install_handlers,
    shape_error,
    shape_error_event,
    shortened,
)
from rtap_server.http.request_id import RequestIdMiddleware
from tests.error_shapes import error_of


class Body(BaseModel):
    n: int
    stop: str | list[str] = ""


def make_app() -> RequestIdMiddleware:
    app = FastAPI()
    install_handlers(app)
    raised = {"400": InvalidRequest("i", param="n"), "503": Overloaded("o"), "404": UnknownRequest("u")}

    @app.post("/body")
    async def body(given: Body): ...

    @app.get("/raise/{name}")
    async def raise_(name: str):
        raise raised[name]

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

    @app.get("/v1/messages/{name}")
    async def messages(name: str):
        if name == "vllm":
            return JSONResponse({"type": "error", "error": {"type": "x", "message": "m"}}, status_code=404)
        raise raised[name]

    return RequestIdMiddleware(app)


@pytest.fixture(scope="module")
def app() -> RequestIdMiddleware:
    return make_app()


async def ask(app, method: str, path: str, **options) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize(
    ("method", "path", "status", "type_", "code", "message"),
    [
        ("GET", "/nowhere", 404, "not_found_error", None, "Not Found"),
        ("POST", "/raise/400", 405, "invalid_request_error", None, "Method Not Allowed"),
        ("GET", "/raise/400", 400, "invalid_request_error", None, "i"),
        ("GET", "/raise/404", 404, "not_found_error", None, "u"),
        ("GET", "/raise/503", 503, "overloaded_error", "server_is_overloaded", "o"),
        ("GET", "/crash", 500, "server_error", None, "the server failed on this request"),
        ("GET", "/detail", 418, "invalid_request_error", None, "no /usr/lib/python3/site.py here"),
        ("GET", "/text", 502, "server_error", None, "the server failed on this request"),
    ],
)
async def test_every_error_has_openais_shape(app, method, path, status, type_, code, message):
    reply = await ask(app, method, path)
    error = error_of(path, reply.json())
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert (error["type"], error["code"]) == (type_, code)
    assert error["message"].startswith(message)
    assert "secret" not in reply.text
    assert "0x" not in reply.text
    if status in (500, 502):
        assert error["message"].endswith(f"under request id {reply.headers['x-request-id']}")


@pytest.mark.parametrize(
    ("method", "name", "status", "type_", "message"),
    [
        ("GET", "vllm", 404, "not_found_error", "m"),
        ("GET", "400", 400, "invalid_request_error", "i"),
        ("GET", "503", 503, "overloaded_error", "o"),
        ("GET", "crash", 500, "api_error", "the server failed on this request"),
        ("POST", "vllm", 405, "invalid_request_error", "Method Not Allowed"),
    ],
)
async def test_every_error_below_messages_has_anthropics_shape(app, method, name, status, type_, message):
    reply = await ask(app, method, f"/v1/messages/{name}")
    error = error_of("/v1/messages", reply.json())
    assert (reply.status_code, error["type"]) == (status, type_)
    assert error["message"].startswith(message)
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


def subclasses(of: type) -> list[type]:
    return [of, *(inner for direct in of.__subclasses__() for inner in subclasses(direct))]


@pytest.mark.parametrize("class_", subclasses(RtapError))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_every_class_of_ours_and_its_subclasses_have_a_status_and_keep_their_sentence(class_, path):
    more = {"retry_after_seconds": 3} if issubclass(class_, errors.RateLimited | Overloaded) else {}
    for raised in (class_("said so", **more), type("Sub", (class_,), {})("said so", **more)):
        response = error_response(raised)
        expected = next(STATUS[c] for c in class_.__mro__ if c in STATUS)
        shown = shape_error(response.status_code, bytes(response.body), "id-1", path)
        assert shown is not None
        error = error_of(path, json.loads(shown.body))
        assert (response.status_code, error.get("code", expected[1])) == expected
        assert error["type"] == error_type(expected[0], is_anthropic=path == "/v1/messages")
        assert (error["message"] == "said so") == (expected[0] != 500)
        again = shape_error(response.status_code, shown.body, "id-1", path)
        assert again is not None
        assert again.body == shown.body  # behind a gateway it is shaped again


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
@pytest.mark.parametrize(("status", "name"), [
    (400, "BadRequestError"), (401, "AuthenticationError"), (404, "NotFoundError"), (429, "RateLimitError"),
    (500, "InternalServerError"), (503, "InternalServerError"),
])  # fmt: skip
def test_the_official_clients_read_type_code_and_param(vendor, status, name):
    sdk = pytest.importorskip(vendor)
    path = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[vendor]
    said = {"error": {"message": "m", "type": "BadRequestError", "param": "n", "code": status}}
    shaped = shape_error(status, json.dumps(said).encode(), "id-1", path)
    assert shaped is not None
    client = getattr(sdk, vendor.replace("openai", "OpenAI").replace("anthropic", "Anthropic"))(
        api_key="k", base_url="http://x"
    )
    import httpx2

    response = httpx2.Response(status, content=shaped.body, request=httpx2.Request("POST", f"http://x{path}"))
    raised = client._make_status_error_from_response(response)
    assert isinstance(raised, getattr(sdk, name))
    assert raised.type == error_type(status, is_anthropic=vendor == "anthropic")
    if vendor == "openai":
        assert (raised.param, raised.code) == ("n", None)


async def test_headers_of_an_error_stay(app):
    assert "GET" in (await ask(app, "DELETE", "/probe")).headers["allow"]
    assert (await ask(app, "GET", "/raise/503")).headers["retry-after"] == "1"


async def test_what_is_no_error_stays(app):
    assert (await ask(app, "GET", "/probe")).json() == {"status": "not ready"}


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"n": "my value"}, "n", "n='my value': Input should be a valid integer"),
        ({"n": 1, "stop": ["a", 5]}, "stop.1", "stop.1=5: Input should be a valid string"),
        ({"n": "x" * 5000}, "n", "n='" + "x" * 95),
        ({"n": [1] * 100_000}, "n", "n=[1, 1"),
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
        (b'{"error": "\xff"}', "Bad Request"),
        (json.dumps({"error": {"message": "x" * 5000, "type": "t"}}).encode(), "x" * 1000),
    ],
)
def test_shapes_of_others(body, expected):
    shaped = shape_error(400, body, "id-1", "/v1/models")
    assert (shaped and json.loads(shaped.body)["error"]["message"]) == expected


@pytest.mark.parametrize(
    ("status", "message", "param", "code"),
    [
        (404, "The model `x` does not exist.", "model", "model_not_found"),
        (404, "no such response", None, None),
        (400, "This model's maximum context length is 64 tokens. However, your prompt contains 99 input tokens",
         "input_tokens", "context_length_exceeded"),
        (400, "Input length (99) exceeds model's maximum context length (64).", None, "context_length_exceeded"),
        (400, "The decoder prompt (length 99) is longer than the maximum model length of 64.", None,
         "context_length_exceeded"),
        (400, "99 tokens in prompt are more than the model's context of 64", "prompt", "context_length_exceeded"),
        (400, "temperature must be non-negative, got -1.", "temperature", None),
    ],
)  # fmt: skip
def test_openais_codes_for_errors_of_vllm(status, message, param, code):
    said = {"error": {"message": message, "type": "BadRequestError", "param": param, "code": status}}
    shaped = shape_error(status, json.dumps(said).encode(), "id-1", "/v1/completions")
    assert shaped is not None
    assert json.loads(shaped.body) == {
        "error": {"message": message, "type": error_type(status), "param": param, "code": code}
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
@pytest.mark.parametrize("status", [500, 501, 502, 503, 504, 599])
@pytest.mark.parametrize(
    ("message", "is_inside"),
    [
        ("The model does not support the Messages API", False),
        ("retry after the KV transfer", False),
        ("no and/or option", False),
        ("lost tcp://10.0.0.7:5557", True),
        ("10.0.0.7 is gone", True),
        ("cannot open /dev/shm/psm_1", True),
        ("C:\\models\\x", True),
        ("<Engine object at 0x7f0012ab>", True),
    ],
)
async def test_a_failure_tells_nothing_of_the_inside_and_is_logged_under_the_request_id(
    path, status, message, is_inside, caplog
):
    async def inner(scope, receive, send):
        said = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": status}}
        await JSONResponse(said, status)(scope, receive, send)

    reply = await ask(RequestIdMiddleware(inner), "POST", path, headers={"x-request-id": "id-1"})
    is_told = status in (501, 503) and not is_inside
    generic = "the server failed on this request; its log has the cause under request id id-1"
    assert error_of(path, reply.json())["message"] == (message if is_told else generic)
    logged = [record.getMessage() for record in caplog.records if record.name == "rtap.errors"]
    assert logged == ([] if is_told else [f"request id-1 failed with status {status}: {message!r}"])


@pytest.mark.parametrize(
    ("error", "message", "type_"),
    [
        (
            {"message": "See stack trace (above)", "type": "InternalServerError", "code": 500},
            "the server failed",
            "server_error",
        ),
        (
            {"message": "list index in /usr/lib/x.py", "type": "BadRequestError", "code": 400},
            "list index in /usr/lib/x.py",
            "invalid_request_error",
        ),
        ({"message": "m"}, "the server failed", "server_error"),
        ({"message": "m", "code": "strange"}, "the server failed", "server_error"),
    ],
)
def test_an_error_event_of_a_stream_tells_nothing_of_the_inside(error, message, type_):
    shown = error_of("/", json.loads(shape_error_event(json.dumps({"error": error}).encode(), "id-1")))
    assert shown["message"].startswith(message)
    assert shown["type"] == type_


def test_an_error_event_of_messages_keeps_anthropics_shape_and_is_logged_once(caplog):
    begin_request(state := RequestState("id-1"))
    event = b'{"type":"error","error":{"type":"internal_error","message":"m"}}'
    for _ in range(2):
        shown = error_of("/v1/messages", json.loads(shape_error_event(event, "id-1")))
        assert (shown["type"], shown["message"][:17]) == ("api_error", "the server failed")
    assert [r.getMessage() for r in caplog.records] == ["request id-1 failed with status 500: 'm'"]
    assert state.is_failure_logged


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=30), 
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip
_PARTS = st.dictionaries(st.sampled_from(["message", "type", "param", "code", "loc", "ctx", "input", "msg"]), _ANY)
_ERRORS = st.dictionaries(st.sampled_from(["error", "detail", "type"]), _ANY | _PARTS, max_size=3)


@settings(deadline=None)
@given(st.integers(400, 599), st.one_of(_ANY, _ERRORS), st.binary(max_size=30), st.sampled_from(["/", "/v1/messages"]))
def test_shaping_never_fails_whatever_others_write(status, value, raw, path):
    logging.getLogger("rtap.errors").disabled = True
    try:
        for body in (json.dumps(value).encode(), raw):
            shown = shape_error(status, body, "id", path)
            assert shown is None or error_of(path, json.loads(shown.body))["message"]
            shape_error_event(body, "id")
    finally:
        logging.getLogger("rtap.errors").disabled = False


@settings(deadline=None)
@given(st.lists(st.text(max_size=9) | st.fixed_dictionaries({"loc": st.lists(st.text(max_size=9) | st.integers())}, 
       optional={"msg": st.text(max_size=9), "type": st.text(max_size=9), "input": _ANY, "ctx": st.just({})}),
       max_size=4))  # fmt: skip
def test_a_failed_validation_is_always_a_400(found):
    """Some checks of vLLM report sentences where pydantic reports dictionaries."""
    assert isinstance(_invalid(found), InvalidRequest)


@pytest.mark.parametrize("value", ["x" * 10**7, [1] * 10**7, {"a": ["b" * 10**6] * 10}, 10**300, "\ud800"])
def test_a_quoted_value_is_short_and_can_be_sent(value):
    assert len(shortened(value)) <= 100
    assert json.loads(bytes(error_response(InvalidRequest(f"n={shortened(value)} \ud800")).body))
