"""One table from our errors to HTTP, in OpenAI's error shape. Routes raise; nothing here or there catches broadly.

Errors that others wrote (vLLM's routes, the router) are brought into the same shape, without what they tell of the
server's inside.
"""

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from rtap_core.errors import (
    BodyTooLarge,
    ConfidenceError,
    Conflict,
    Draining,
    HeadTooLarge,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RtapError,
    Unauthorized,
    UnknownRequest,
)
from rtap_server.http.privacy import without_internals

# class -> (status, OpenAI error type)
STATUS: dict[type[RtapError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "authentication_error"),
    UnknownRequest: (404, "not_found_error"),
    Conflict: (409, "conflict_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    HeadTooLarge: (431, "invalid_request_error"),
    RateLimited: (429, "rate_limit_error"),
    Overloaded: (503, "overloaded_error"),
    ConfidenceError: (503, "confidence_unavailable"),
    RtapError: (500, "internal_error"),
}

# What has one of these was written here; but for the last, which vLLM's /v1/messages gives to whatever broke.
_OURS = frozenset(type_ for _, type_ in STATUS.values()) - {"internal_error"}
_INTERNAL = "the server failed on this request; its log has more under the request's id"
_MOST_CHARACTERS = 1000
_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})  # pydantic's, of a union; no fields


def error_body(message: str, *, status: int, type_: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``, as the OpenAI SDKs read it."""
    return {"error": {"message": message, "type": type_, "param": param, "code": status}}


def describe(error: RtapError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) for an error of ours."""
    status, type_ = next(STATUS[c] for c in type(error).__mro__ if c in STATUS)
    return status, error_body(str(error), status=status, type_=type_, param=getattr(error, "param", None))


def response_to(error: RtapError) -> JSONResponse:
    """The whole answer to an error of ours, with the headers that its status asks for."""
    status, body = describe(error)
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    if isinstance(error, RateLimited | Overloaded):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Conflict):
        headers["x-should-retry"] = "false"  # OpenAI's clients repeat a 409 by themselves
    if isinstance(error, Draining):  # so that a client's next try finds another server
        headers["Connection"] = "close"
    return JSONResponse(body, status_code=status, headers=headers)


def shaped_event(data: bytes) -> bytes:
    """The error that ends a stream, in our shape."""
    told: Any = msgspec.json.decode(data)
    code: Any = told["error"].get("code")
    is_status = isinstance(code, int) and code in set(HTTPStatus)
    return shaped_error(code if is_status else HTTPStatus.INTERNAL_SERVER_ERROR, data, str) or data


def shaped_error(status: int, body: bytes, clean: Callable[[str], str]) -> bytes | None:
    """An error reply in our shape, or None where it tells no error (a probe, say, or nothing at all).

    clean: takes out of a text what must not be repeated. An Anthropic error keeps the field that marks it as one."""
    try:
        reply: Any = msgspec.json.decode(body) if body else None
    except msgspec.DecodeError:
        reply = {"detail": HTTPStatus(status).phrase}  # text or a page of somebody's: nothing of it is ours to tell
    if not isinstance(reply, dict) or not {"error", "detail"} & cast(dict[str, Any], reply).keys():
        return None
    fields = cast(dict[str, Any], reply)
    told: Any = fields.get("error", fields.get("detail"))
    error = cast(dict[str, Any], told) if isinstance(told, dict) else {"message": told}
    type_ = error.get("type")
    shaped = error_body(
        _message(status, error, clean),
        status=status,
        type_=type_ if isinstance(type_, str) else _type_of(status),
        param=error.get("param"),
    )
    return msgspec.json.encode(shaped if fields.get("type") != "error" else {"type": "error", **shaped})


def _message(status: int, error: dict[str, Any], clean: Callable[[str], str]) -> str:
    message = error.get("message")
    is_ours = error.get("type") in _OURS
    if not is_ours and status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY):
        return _INTERNAL
    text = message if isinstance(message, str) and message else HTTPStatus(status).phrase
    text = text[:_MOST_CHARACTERS]
    return clean(text if is_ours else without_internals(text))


def _type_of(status: int) -> str:
    """OpenAI's word for errors that have none: those of the router."""
    known = {code: type_ for code, type_ in STATUS.values() if code != HTTPStatus.CONFLICT}
    return known.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error")


def install_handlers(app: FastAPI) -> None:
    """Answer RtapErrors raised in routes, and bodies that no route takes without repeating what was in them."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RtapError)  # the only class this handler is registered for
        return response_to(error)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_to(_invalid(error))

    app.add_exception_handler(RtapError, answer)
    app.add_exception_handler(RequestValidationError, refuse)


def _invalid(error: RequestValidationError) -> InvalidRequest:
    """One thing that is wrong, by its field and the rule; pydantic's own text has the value in it."""
    wrong = max(error.errors(), key=lambda one: len(_fields(one["loc"])))  # of a union, the branch that went furthest
    cause: Any = wrong.get("ctx", {}).get("error")
    param = getattr(cause, "parameter", None) or ".".join(_fields(wrong["loc"])) or None
    rule = str(wrong["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {rule}" if param else rule, param=param)


def _fields(where: Sequence[str | int]) -> list[str]:
    """Names and numbers on the way to a value, without the branches of unions that pydantic went."""
    parts = [str(part) for part in where if part != "body"]
    return [
        part for part in parts if part.replace("_", "").isalnum() and part == part.lower() and part not in _BRANCHES
    ]
