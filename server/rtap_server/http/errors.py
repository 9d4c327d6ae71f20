"""HTTP responses for errors: one table of statuses, and one shape for each API."""

import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from rtap_core.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ConfidenceError,
    Draining,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RtapError,
    Unauthorized,
    UnknownModel,
    UnknownRequest,
)
from rtap_server.engine.request_state import current_request
from rtap_server.telemetry.logs import ERRORS

# class -> (status, OpenAI error code). OpenAI's SDKs and litellm read the codes, so they are OpenAI's where it has one.
STATUS: dict[type[RtapError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    Unauthorized: (401, "invalid_api_key"),
    UnknownRequest: (404, None),
    UnknownModel: (404, "model_not_found"),
    BodyTooSlow: (408, "request_timeout"),
    BodyTooLarge: (413, "request_too_large"),
    RateLimited: (429, "rate_limit_exceeded"),
    Draining: (503, "server_is_shutting_down"),
    Overloaded: (503, "server_is_overloaded"),
    ConfidenceError: (503, "confidence_unavailable"),
    RtapError: (500, None),
}
_OUR_CODES = frozenset(code for _, code in STATUS.values() if code is not None)

# status -> error type, the same in both APIs; other 4xx are invalid_request_error.
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Sentences of vLLM and of ours about a prompt that is longer than the context.
_TOO_LONG = re.compile(r"maximum (?:context|model) length|longer than the maximum|the model's context")
_ANTHROPIC_PATHS = "/v1/messages"

# Paths, addresses and pointers, in an error of an engine that is not the client's fault.
_INTERNALS = re.compile(r"(?<![\w.])/[\w.~-]+/|[A-Za-z]:\\|\w://|\b\d+\.\d+\.\d+\.\d+|\b0x[0-9a-fA-F]{4}|\bFile \"")
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_VALUE_CHARACTERS = 100
# Branch names that pydantic puts into the location of an error inside a union; they are no fields.
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})
_logger = logging.getLogger(ERRORS)


def error_type(status: int, *, is_anthropic: bool = False) -> str:
    """The ``type`` of an error."""
    if status in _TYPES:
        return _TYPES[status]
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return "invalid_request_error"
    return "api_error" if is_anthropic else "server_error"


def error_body(message: str, *, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``, as the OpenAI SDKs read it."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def error_response(error: RtapError) -> JSONResponse:
    """The response to one of our errors, with the headers that its status needs.

    It has OpenAI's shape; RequestIdMiddleware gives it the shape of its path."""
    status, code = next(STATUS[c] for c in type(error).__mro__ if c in STATUS)
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimited | Overloaded):
        headers["Retry-After"] = str(error.retry_after_seconds)
    # After Draining the client's retry opens a connection, perhaps to another server. BodyTooSlow: the rest of the body
    # may never come.
    if isinstance(error, Draining | BodyTooSlow):
        headers["Connection"] = "close"
    body = error_body(_encodable(str(error)), status=status, code=code, param=getattr(error, "param", None))
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


class ShapedError(NamedTuple):
    """An error body for the client. hidden: the message that it does not show, for the log."""

    body: bytes
    hidden: str | None


def shape_error(status: int, body: bytes, request_id: str, path: str) -> ShapedError | None:
    """An error in the shape of ``path``: Anthropic's below /v1/messages, else OpenAI's.

    None when ``body`` is not an error (a failing probe, for example). 4xx messages pass unchanged, the client's own
    values included. Failures of others become one generic sentence with the request id."""
    try:
        decoded: Any = msgspec.json.decode(body) if body else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = {"detail": None}  # text or HTML
    if not isinstance(decoded, dict) or not {"error", "detail"} & cast(dict[str, Any], decoded).keys():
        return None
    fields = cast(dict[str, Any], decoded)
    detail: Any = fields.get("error", fields.get("detail"))
    error = cast(dict[str, Any], detail) if isinstance(detail, dict) else {"message": detail}
    message, code, param = (
        value if isinstance(value := error.get(name), str) else None for name in ("message", "code", "param")
    )
    message, hidden = message or _phrase(status), None
    is_failure = status >= HTTPStatus.INTERNAL_SERVER_ERROR and code not in _OUR_CODES
    # An engine's 501 and 503 are about the request or the moment; they pass if they name nothing of the inside.
    if is_failure and (status not in (501, 503) or _INTERNALS.search(message)):
        hidden = message
        message = f"the server failed on this request; its log has the cause under request id {request_id}"
    code = code or _code(status, message, param)  # vLLM's is a number, the status
    message = message[:_MAX_MESSAGE_CHARACTERS]
    if path.startswith(_ANTHROPIC_PATHS):
        shown = {"type": error_type(status, is_anthropic=True), "message": message}
        return ShapedError(msgspec.json.encode({"type": "error", "error": shown, "request_id": request_id}), hidden)
    return ShapedError(msgspec.json.encode(error_body(message, status=status, code=code, param=param)), hidden)


def shape_error_event(data: bytes, request_id: str) -> bytes:
    """The data of a stream's error event, in the shape that it has: Anthropic's (``"type": "error"``) or OpenAI's.

    A failure is logged, because vLLM logs it without the request id."""
    try:
        fields: Any = msgspec.json.decode(data)
        code: Any = fields["error"].get("code")
        is_anthropic = fields.get("type") == "error"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError, AttributeError):
        code, is_anthropic = None, False
    status = code if isinstance(code, int) and code in set(HTTPStatus) else int(HTTPStatus.INTERNAL_SERVER_ERROR)
    shaped = shape_error(status, data, request_id, _ANTHROPIC_PATHS if is_anthropic else "")
    if shaped is None:
        return data
    log_hidden(status, shaped.hidden)
    return shaped.body


def log_hidden(status: int, message: str | None) -> None:
    """Log the message that a failed request's client does not see, unless the log has the failure."""
    state = current_request()
    if message is not None and not state.is_failure_logged:
        _logger.error("request %s failed with status %d: %.1000r", state.request_id, status, message)
        state.is_failure_logged = True


def _code(status: int, message: str, param: str | None) -> str | None:
    """OpenAI's code for an error of vLLM."""
    if status == HTTPStatus.NOT_FOUND and param == "model":
        return "model_not_found"
    return "context_length_exceeded" if status == HTTPStatus.BAD_REQUEST and _TOO_LONG.search(message) else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP status {status}"


def _encodable(text: str) -> str:
    """``text`` without the lone surrogates that UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def install_handlers(app: FastAPI) -> None:
    """Answer RtapErrors raised in routes, and request bodies that fail validation."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RtapError)  # the only class this handler is registered for
        return error_response(error)

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error.errors()))

    app.add_exception_handler(RtapError, answer)
    app.add_exception_handler(RequestValidationError, refuse)


_quoted = reprlib.Repr()
_quoted.maxlist = _quoted.maxdict = 20
_quoted.maxstring = _quoted.maxlong = _quoted.maxother = _MAX_VALUE_CHARACTERS


def shortened(value: object) -> str:
    """A client's value as an error quotes it: ``repr``, at most 100 characters."""
    is_text = isinstance(value, str | bytes)
    text = repr(value[:_MAX_VALUE_CHARACTERS]) if is_text else _quoted.repr(value)  # never all of a long list
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 1] + "…"


def _invalid(errors: Sequence[Any]) -> InvalidRequest:
    """The most specific failure: its field, the client's value and the rule. vLLM's own checks give sentences only."""
    described = [cast(dict[str, Any], one) for one in errors if isinstance(one, dict) and "loc" in one]
    if not described:
        return InvalidRequest("; ".join(map(str, errors[:1])) or "the request is invalid")
    wrong = max(described, key=lambda one: len(_fields(one["loc"])))  # in a union, the branch that went furthest
    context: dict[str, Any] = wrong.get("ctx") or {}
    cause, given = context.get("error"), wrong.get("input")
    param = getattr(cause, "parameter", None) or ".".join(_fields(wrong["loc"])) or None
    rule = str(wrong.get("msg", "is invalid")).removeprefix("Value error, ")
    if param is None:
        return InvalidRequest(rule)
    is_value = "input" in wrong and wrong.get("type") != "missing" and not isinstance(given, dict)
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
