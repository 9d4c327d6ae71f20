"""One table from our errors to HTTP, in OpenAI's error shape. Routes raise; nothing here or there catches broadly."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from server.rtap.errors import (
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
    if isinstance(error, Draining):  # so that a client's next try finds another server
        headers["Connection"] = "close"
    return JSONResponse(body, status_code=status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Answer RtapErrors raised in routes."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RtapError)  # the only class this handler is registered for
        return response_to(error)

    app.add_exception_handler(RtapError, answer)
