"""Outermost layer: request state, ``x-request-id``, and one error shape for every response.

Plain ASGI around the whole application, Starlette's own error handler included.
"""

import logging
import re
import uuid
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_server.engine.request_state import RequestState, begin_request
from rtap_server.http.errors import shape_error
from rtap_server.telemetry.logs import ERRORS

REQUEST_ID = b"x-request-id"
_VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # safe in a header and in a log line
_logger = logging.getLogger(ERRORS)


class RequestIdMiddleware:
    """Create the state of each request and shape its errors.

    vLLM would use the client's ``x-request-id`` as its engine id, so that two clients with the same id abort each
    other. The header is therefore removed from the request and echoed in the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == REQUEST_ID]
        is_valid = len(given) == 1 and _VALID_ID.fullmatch(given[0])
        request_id = given[0].decode() if is_valid else uuid.uuid4().hex
        begin_request(state := RequestState(request_id))
        scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != REQUEST_ID]}
        response = _ErrorShaper(send, request_id)
        try:
            await self._app(scope, receive, response)
        except Exception:
            if not state.is_failure_logged:
                _logger.exception("request %s failed", request_id)
            if not response.is_complete:
                raise


class _ErrorShaper:
    """A ``send`` that adds the request id to a response and rewrites error bodies."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [header for header in message.get("headers", ()) if header[0].lower() != REQUEST_ID]
            message = {**message, "headers": [*others, (REQUEST_ID, self._request_id.encode())]}
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._start = message  # sent with the whole body, which decides its content-length
                return
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self._start is not None:
                self._parts.append(message.get("body", b""))
                if self.is_complete:
                    await self._finish(self._start, b"".join(self._parts))
                return
        await self._send(message)

    async def _finish(self, start: Message, body: bytes) -> None:
        shaped = shape_error(start["status"], body, self._request_id)
        if shaped is not None:
            body = shaped
            others = [h for h in start["headers"] if h[0].lower() not in (b"content-length", b"content-type")]
            length = (b"content-length", str(len(body)).encode())
            start = {**start, "headers": [*others, length, (b"content-type", b"application/json")]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
