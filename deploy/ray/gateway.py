"""ASGI gateway of a fleet: forward each request to a replica and its reply to the client.

It runs inside ``AuthMiddleware``, which counts the limits of API keys for the whole fleet. When a replica dies, the
request goes to another one as long as the client has received nothing. A ``Fleet`` chooses replicas; Ray is not used.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deploy.ray.traffic import (
    EventReader,
    ForwardedRequest,
    ResponseStart,
    conversation_key,
    merge_metrics,
    response_tokens,
)
from rtap_core.errors import BodyTooLarge, Overloaded
from rtap_server.engine.request_state import current_request
from rtap_server.http.errors import error_body, error_response
from rtap_server.http.route_kinds import route_path

# Known to one replica only, so these go to all.
_BROADCAST_PATHS = ("/v1/rtap/feedback", "/v1/responses/")
_HOP_HEADERS = frozenset({b"host", b"connection", b"transfer-encoding", b"content-length", b"expect"})
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ReplicaLost(Exception):
    """The replica ended, or could not be reached, before its reply was complete."""


class Fleet(Protocol):
    """The replicas of the server."""

    def send(self, request: ForwardedRequest, conversation: str) -> AsyncGenerator[ResponseStart | bytes]:
        """Yield the start of the reply, then its body in parts; closing the generator aborts the request.

        One conversation goes to one replica while that runs. Raises ReplicaLost."""
        ...

    async def broadcast(self, request: ForwardedRequest) -> Mapping[str, tuple[ResponseStart, bytes]]:
        """Complete replies of all replicas that answer, by name."""
        ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """attempts: replicas tried for one request. pause_seconds: before the first retry, doubled before each further one.

    ready_seconds: time limit of /ready."""

    attempts: int = 6
    pause_seconds: float = 0.1
    ready_seconds: float = 4.0


class Gateway:
    """The ASGI application."""

    def __init__(
        self, fleet: Fleet, registry: CollectorRegistry, *, max_body_bytes: int, retry_policy: RetryPolicy | None = None
    ) -> None:
        self._fleet, self._registry, self._max_body_bytes = fleet, registry, max_body_bytes
        self._retry_policy = retry_policy or RetryPolicy()
        self._retries = Counter(
            "rtap_gateway_retries", "Requests sent to another replica after one was lost.", registry=registry
        )
        self._broken = Counter("rtap_gateway_broken_streams", "Streams cut by a lost replica.", registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "the gateway accepts HTTP only"})
            return
        path = route_path(scope)
        if path == "/live":
            await JSONResponse({"status": "alive"})(scope, receive, send)
            return
        request = await self._read(scope, path, receive)
        if request is None:
            message = f"the request body is larger than {self._max_body_bytes} bytes; shorten it"
            await error_response(BodyTooLarge(message))(scope, receive, send)
        elif path.rstrip("/") == "/metrics":
            await (await self._metrics(request))(scope, receive, send)
        elif path == "/ready":
            await (await self._ready(request))(scope, receive, send)
        elif path.startswith(_BROADCAST_PATHS):
            await (await self._find(request))(scope, receive, send)
        else:
            await self._forward(request, scope, receive, send)

    async def _read(self, scope: Scope, path: str, receive: Receive) -> ForwardedRequest | None:
        """The complete request; None when its body is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                return None
        headers = [(k, v) for k, v in scope["headers"] if k not in _HOP_HEADERS]
        headers.append((b"x-request-id", current_request().request_id.encode()))  # the same for every attempt
        return ForwardedRequest(scope["method"], path, scope["query_string"], tuple(headers), bytes(body))

    async def _forward(self, request: ForwardedRequest, scope: Scope, receive: Receive, send: Send) -> None:
        conversation, pause = conversation_key(request), self._retry_policy.pause_seconds
        for attempt in range(self._retry_policy.attempts):
            if attempt:
                self._retries.inc()
                await asyncio.sleep(pause)
                pause *= 2
            reply = self._fleet.send(request, conversation)
            try:
                start = await anext(reply)
                assert isinstance(start, ResponseStart)
                if start.is_stream:
                    await self._stream(request.path, start, reply, send)
                else:
                    body = b"".join([part async for part in reply if isinstance(part, bytes)])
                    _charge(response_tokens(body))
                    await _respond(start, body)(scope, receive, send)
                return
            except (ReplicaLost, StopAsyncIteration):
                continue
            finally:
                await reply.aclose()
        error = Overloaded("no replica could answer this request; try again in a few seconds")
        await error_response(error)(scope, receive, send)

    async def _stream(
        self, path: str, start: ResponseStart, reply: AsyncGenerator[ResponseStart | bytes], send: Send
    ) -> None:
        """Forward a stream event by event.

        A lost replica raises ReplicaLost before the first event; after it the stream ends with an error event."""
        reader, begun = EventReader(), False
        try:
            async for part in reply:
                assert isinstance(part, bytes)
                events = reader.feed(part)
                if events and not begun:
                    await send({"type": "http.response.start", "status": start.status, "headers": list(start.headers)})
                    begun = True
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            last = reader.rest()
        except ReplicaLost:
            if not begun:
                raise
            self._broken.inc()
            last = _lost_event(path)
        finally:
            _charge(reader.tokens)
        if not begun:
            await send({"type": "http.response.start", "status": start.status, "headers": list(start.headers)})
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _metrics(self, request: ForwardedRequest) -> Response:
        """Series of every replica and of the gateway, with the label ``replica``."""
        replies = await self._fleet.broadcast(request)
        texts = {name: body.decode() for name, (start, body) in replies.items() if start.status == 200}
        refused = [reply for reply in replies.values() if reply[0].status in (401, 403)]
        if refused and not texts:
            return _respond(*refused[0])
        merged = merge_metrics({**texts, "gateway": generate_latest(self._registry).decode()})
        return Response(merged, media_type=_METRICS_TYPE)

    async def _ready(self, request: ForwardedRequest) -> Response:
        """200 while at least one replica is ready."""
        number = 0
        with contextlib.suppress(TimeoutError):
            replies = await asyncio.wait_for(self._fleet.broadcast(request), self._retry_policy.ready_seconds)
            number = sum(start.status == 200 for start, _ in replies.values())
        status = "ready" if number else "not ready"
        return JSONResponse({"status": status, "replicas": number}, status_code=200 if number else 503)

    async def _find(self, request: ForwardedRequest) -> Response:
        """The first reply that is not a 404, else any reply."""
        replies: Sequence[tuple[ResponseStart, bytes]] = list((await self._fleet.broadcast(request)).values())
        if not replies:
            return error_response(Overloaded("no replica could answer this request; try again in a few seconds"))
        known = [reply for reply in replies if reply[0].status != 404]
        return _respond(*(known or replies)[0])


def _charge(tokens: int) -> None:
    """Charge tokens to the API key of the current request."""
    current_request().spent_tokens += tokens


def _respond(start: ResponseStart, body: bytes) -> Response:
    """A complete reply of a replica, unchanged."""
    response = Response(body, status_code=start.status)
    headers = [(k, v) for k, v in start.headers if k != b"content-length"]
    response.raw_headers = [*headers, (b"content-length", str(len(body)).encode())]
    return response


def _lost_event(path: str) -> bytes:
    """Last event of a stream whose replica is lost, in the format of its endpoint."""
    message = "the replica ended before the reply was complete; send the request again"
    if path == "/v1/messages":
        event = {"type": "error", "error": {"type": "overloaded_error", "message": message}}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    if path == "/v1/responses":
        event = {"type": "error", "code": "overloaded_error", "message": message, "param": None}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    error = error_body(message, status=503, code="server_is_overloaded")
    return b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n"


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
