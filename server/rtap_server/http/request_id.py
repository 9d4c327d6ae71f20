"""Outermost layer: request state, ``x-request-id``, singular headers, stream headers, and one shape for every error.

Plain ASGI around the whole application, Starlette's own error handler included.
"""

import asyncio
import logging
import re
import uuid
from collections import Counter
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import InvalidRequest
from rtap_server.engine.request_state import RequestState, begin_request
from rtap_server.http.errors import error_response, log_hidden, shape_error
from rtap_server.http.route_kinds import route_path
from rtap_server.telemetry.logs import ERRORS

REQUEST_ID = b"x-request-id"
# Headers with one value (RFC 9110 and the two APIs). Given twice, one reader takes the first and another the last.
SINGULAR_HEADERS = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"host",
        b"idempotency-key",
        b"origin",
        b"transfer-encoding",
        b"x-api-key",
    }
)
_VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # safe in a header and in a log line
_STREAM = b"text/event-stream"
# Without these a cache may keep a stream, and nginx sends it in one piece at its end.
_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
_STALL_SECONDS = 60.0
_POLICY_VIOLATION = 1008
_logger = logging.getLogger(ERRORS)


class RequestIdMiddleware:
    """Create the state of each request, shape its errors, and end a stream that its client does not read.

    vLLM would use the client's ``x-request-id`` as its engine id, so that two clients with the same id abort each
    other. The header is therefore removed from the request and echoed in the response."""

    def __init__(self, app: ASGIApp, *, stall_seconds: float = _STALL_SECONDS) -> None:
        """stall_seconds: a stream whose next bytes cannot be sent for this long ends as if its client had left."""
        self._app, self._stall_seconds = app, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == REQUEST_ID]
        is_valid = len(given) == 1 and _VALID_ID.fullmatch(given[0])
        request_id = given[0].decode() if is_valid else uuid.uuid4().hex
        begin_request(state := RequestState(request_id))
        response = _Response(receive, send, request_id, route_path(scope), self._stall_seconds)
        if (error := _repeated_header(scope)) is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(error)})
            else:
                await error_response(error)(scope, receive, response.send)
            return
        scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != REQUEST_ID]}
        try:
            await self._app(scope, response.receive, response.send)
            log_hidden(response.status, response.hidden)
        except Exception:
            if not state.is_failure_logged:
                _logger.exception("request %s failed", request_id)
            if not response.is_complete:
                raise
        finally:
            response.close()


def _repeated_header(scope: Scope) -> InvalidRequest | None:
    counts = Counter(name for name, _ in scope["headers"] if name in SINGULAR_HEADERS)
    for name, count in counts.items():
        if count > 1:
            shown = name.decode()
            return InvalidRequest(f"the header {shown} is given {count} times; send it once", param=shown)
    return None


class _Response:
    """``send`` and ``receive`` of a request: they add headers, shape errors, and report a stalled client as gone."""

    def __init__(self, receive: Receive, send: Send, request_id: str, path: str, stall_seconds: float) -> None:
        self._receive, self._send, self._request_id, self._path = receive, send, request_id, path
        self._loop, self._stall_seconds = asyncio.get_running_loop(), stall_seconds
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None  # of a stream
        self._sends_since = 0.0
        self._sender: asyncio.Task[Any] | None = None
        self._receiver: asyncio.Task[Any] | None = None
        self._is_gone = False
        self.is_complete = False
        self.status, self.hidden = 0, None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._begin(message)
            if self.status >= HTTPStatus.BAD_REQUEST:
                self._start = message  # sent with the whole body, which decides its content-length
                return
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self._start is not None:
                self._parts.append(message.get("body", b""))
                if self.is_complete:
                    await self._finish(self._start, b"".join(self._parts))
                return
        if self._timer is None:
            await self._send(message)
        elif not self._is_gone:
            self._sender, self._sends_since = asyncio.current_task(), self._loop.time()
            try:
                await self._send(message)  # uvicorn waits here while its buffer is full
            except asyncio.CancelledError:
                if not self._is_own_cancellation():
                    raise
            self._sender = None

    async def receive(self) -> Message:
        if not self._is_gone:
            self._receiver = task = asyncio.current_task()
            try:
                return await self._receive()
            except asyncio.CancelledError:
                if not self._is_own_cancellation():
                    raise
            finally:
                if self._receiver is task:  # vLLM cancels its own listener while that of the stream has begun
                    self._receiver = None
        return {"type": "http.disconnect"}

    def close(self) -> None:
        """Stop watching the stream."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, message: Message) -> Message:
        self.status = message["status"]
        headers: list[tuple[bytes, bytes]] = [(name.lower(), value) for name, value in message.get("headers", ())]
        added = [(REQUEST_ID, self._request_id.encode())]
        if any(name == b"content-type" and value.startswith(_STREAM) for name, value in headers):
            added += _STREAM_HEADERS
            self._timer = self._loop.call_later(self._stall_seconds, self._check_progress)
        names = {name for name, _ in added}
        return {**message, "headers": [*(header for header in headers if header[0] not in names), *added]}

    def _check_progress(self) -> None:
        now = self._loop.time()
        left = self._stall_seconds if self._sender is None else self._sends_since + self._stall_seconds - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_progress)
            return
        _logger.warning("request %s ended: its client read nothing for %g s", self._request_id, self._stall_seconds)
        # As uvicorn does for a client that has left: what waits in send or receive goes on. A cancelled request would
        # leave the generator of the stream to the garbage collector, and the engine would work on.
        self._is_gone = True
        for task in (self._sender, self._receiver):
            if task is not None:
                task.cancel()

    def _is_own_cancellation(self) -> bool:
        task = asyncio.current_task()
        return self._is_gone and task is not None and task.uncancel() == 0

    async def _finish(self, start: Message, body: bytes) -> None:
        shaped = shape_error(start["status"], body, self._request_id, self._path)
        if shaped is not None:
            body, self.hidden = shaped
            others = [header for header in start["headers"] if header[0] not in (b"content-length", b"content-type")]
            length = (b"content-length", str(len(body)).encode())
            start = {**start, "headers": [*others, length, (b"content-type", b"application/json")]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
