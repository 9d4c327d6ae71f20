"""HTTP responses for errors: one table from our error classes, one shape for errors written by vLLM and the router."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from rtap_core.errors import (
    BodyTooLarge,
    ConfidenceError,
    Draining,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RtapError,
    Unauthorized,
    UnknownRequest,
)

# class -> (status, OpenAI error type)
STATUS: dict[type[RtapError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "authentication_error"),
    UnknownRequest: (404, "not_found_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    RateLimited: (429, "rate_limit_error"),
    Overloaded: (503, "overloaded_error"),
    ConfidenceError: (503, "confidence_unavailable"),
    RtapError: (500, "internal_error"),
}

# Errors of these types were written by this module. vLLM's /v1/messages uses "internal_error" for any failure.
_OUR_TYPES = frozenset(type_ for _, type_ in STATUS.values()) - {"internal_error"}
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_VALUE_CHARACTERS = 100
# Branch names that pydantic puts into the location of an error inside a union; they are no fields.
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})


def error_body(message: str, *, status: int, type_: str, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``, as the OpenAI SDKs read it."""
    return {"error": {"message": message, "type": type_, "param": param, "code": status}}


def error_response(error: RtapError) -> JSONResponse:
    """The response to one of our errors, with the headers that its status needs."""
    status, type_ = next(STATUS[c] for c in type(error).__mro__ if c in STATUS)
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimited | Overloaded):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Draining):  # the client's retry then opens a connection, perhaps to another server
        headers["Connection"] = "close"
    body = error_body(str(error), status=status, type_=type_, param=getattr(error, "param", None))
    return JSONResponse(body, status_code=status, headers=headers)


def rejection_reason(error: RtapError) -> str:
    """The label of ``rtap_rejected_total`` for a request refused with ``error``."""
    return next(reason for class_, reason in _REJECTION_REASONS.items() if isinstance(error, class_))


_REJECTION_REASONS: dict[type[RtapError], str] = {
    Draining: "draining",
    Overloaded: "overloaded",
    BodyTooLarge: "body_too_large",
    Unauthorized: "unauthorized",
    RateLimited: "key_limit",
    UnknownRequest: "unknown",
    RtapError: "invalid",
}


def shape_error(status: int, body: bytes, request_id: str) -> bytes | None:
    """An error body in OpenAI's shape; None when ``body`` is not an error (a failing probe, for example).

    4xx messages pass unchanged, the client's own values included. Other people's 500 and 502 become one generic
    sentence with the request id. An Anthropic error keeps ``"type": "error"``."""
    try:
        decoded: Any = msgspec.json.decode(body) if body else None
    except msgspec.DecodeError:
        decoded = {"detail": HTTPStatus(status).phrase}  # text or HTML
    if not isinstance(decoded, dict) or not {"error", "detail"} & cast(dict[str, Any], decoded).keys():
        return None
    fields = cast(dict[str, Any], decoded)
    detail: Any = fields.get("error", fields.get("detail"))
    error = cast(dict[str, Any], detail) if isinstance(detail, dict) else {"message": detail}
    type_ = error.get("type")
    shaped = error_body(
        _message(status, error, request_id),
        status=status,
        type_=type_ if isinstance(type_, str) else _default_type(status),
        param=error.get("param"),
    )
    return msgspec.json.encode(shaped if fields.get("type") != "error" else {"type": "error", **shaped})


def shape_error_event(data: bytes, request_id: str) -> bytes:
    """The data of a stream's error event in OpenAI's shape."""
    code: Any = msgspec.json.decode(data)["error"].get("code")
    is_status = isinstance(code, int) and code in set(HTTPStatus)
    return shape_error(code if is_status else HTTPStatus.INTERNAL_SERVER_ERROR, data, request_id) or data


def _message(status: int, error: dict[str, Any], request_id: str) -> str:
    message, is_ours = error.get("message"), error.get("type") in _OUR_TYPES
    if not is_ours and status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.BAD_GATEWAY):
        return f"the server failed on this request; its log has the cause under request id {request_id}"
    text = message if isinstance(message, str) and message else HTTPStatus(status).phrase
    return text[:_MAX_MESSAGE_CHARACTERS]


def _default_type(status: int) -> str:
    """OpenAI's type for an error without one, such as the router's."""
    known = {code: type_ for code, type_ in STATUS.values()}
    return known.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error")


def install_handlers(app: FastAPI) -> None:
    """Answer RtapErrors raised in routes, and request bodies that fail validation."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RtapError)  # the only class this handler is registered for
        return error_response(error)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error))

    app.add_exception_handler(RtapError, answer)
    app.add_exception_handler(RequestValidationError, refuse)


def shortened(value: object) -> str:
    """A client's value as an error quotes it: ``repr``, at most 100 characters."""
    text = repr(value[:_MAX_VALUE_CHARACTERS] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 1] + "…"


def _invalid(error: RequestValidationError) -> InvalidRequest:
    """The most specific failure: its field, the client's value and the rule."""
    wrong = max(error.errors(), key=lambda one: len(_fields(one["loc"])))  # in a union, the branch that went furthest
    cause: Any = wrong.get("ctx", {}).get("error")
    param = getattr(cause, "parameter", None) or ".".join(_fields(wrong["loc"])) or None
    rule = str(wrong["msg"]).removeprefix("Value error, ")
    if param is None:
        return InvalidRequest(rule)
    is_value = "input" in wrong and wrong["type"] != "missing" and not isinstance(wrong["input"], dict)
    return InvalidRequest(
        f"{param}={shortened(wrong['input'])}: {rule}" if is_value else f"{param}: {rule}", param=param
    )


def _fields(location: Sequence[str | int]) -> list[str]:
    """Names and indices on the way to a value, without the branches of unions."""
    parts = [str(part) for part in location if part != "body"]
    return [
        part
        for part in parts
        if part.replace("_", "").isalnum() and part == part.lower() and part not in _UNION_BRANCHES
    ]
