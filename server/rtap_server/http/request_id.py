"""The outermost layer: a request id in and out of every exchange, and one shape of error, whoever wrote it.

Plain ASGI around everything, Starlette's own error handler included. It decides nothing about a request.
"""

import re
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_server.http.errors import shaped_error
from rtap_server.http.schema import begin_exchange

REQUEST_ID = b"x-request-id"
_GOOD_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # it becomes part of reply ids and of log lines


def new_request_id() -> str:
    """An id of our own, for who brings none."""
    return uuid.uuid4().hex


class Edge:
    """Around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin_exchange(None)  # a pipelined request inherits the context of the one before it
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == REQUEST_ID]
        is_good = len(given) == 1 and _GOOD_ID.fullmatch(given[0])
        request_id = given[0] if is_good else new_request_id().encode()
        others = [field for field in scope["headers"] if field[0] != REQUEST_ID]
        # A list of its own: the trailers of a chunked body are still appended to the server's.
        scope = {**scope, "headers": [*others, (REQUEST_ID, request_id)]}
        await self._app(scope, receive, ErrorShaper(send, request_id=request_id))


class ErrorShaper:
    """A ``send`` that gives errors OpenAI's shape. clean: takes out of a text what must not be repeated. request_id:
    for the reply's header."""

    def __init__(self, send: Send, clean: Callable[[str], str] = str, request_id: bytes | None = None) -> None:
        self._send, self._clean, self._id = send, clean, request_id
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._id is not None:
                others = [field for field in message.get("headers", ()) if field[0].lower() != REQUEST_ID]
                message = {**message, "headers": [*others, (REQUEST_ID, self._id)]}
            if message["status"] < HTTPStatus.BAD_REQUEST:
                await self._send(message)
            else:
                self._start = message  # its content-length is known only with the whole body
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish(self._start, b"".join(self._parts))

    async def _finish(self, start: Message, body: bytes) -> None:
        shaped = shaped_error(start["status"], body, self._clean)
        if shaped is not None:
            body = shaped
            told = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-length", b"content-type")]
            length = (b"content-length", str(len(body)).encode())
            start = {**start, "headers": [*told, length, (b"content-type", b"application/json")]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
