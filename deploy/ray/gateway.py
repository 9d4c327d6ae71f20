"""ASGI gateway of a fleet: forward each request to a replica and its reply to the client.

It runs inside ``AuthMiddleware``, which counts the limits of API keys for the whole fleet. When a replica dies before
the client has received anything, the request goes to one other replica. A ``Fleet`` chooses replicas; Ray is not used.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from http import HTTPStatus
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
from rtap_core.errors import Overloaded, RtapError
from rtap_server.engine.request_state import current_request
from rtap_server.http.auth import PROBE_PATHS
from rtap_server.http.body_limits import Body, BodyMemory, Disconnected
from rtap_server.http.errors import error_body, error_response
from rtap_server.http.route_kinds import route_path

# Known to one replica only, so these go to all.
_BROADCAST_PATHS = ("/v1/rtap/feedback", "/v1/responses/")
_HOP_HEADERS = frozenset({b"host", b"connection", b"transfer-encoding", b"content-length", b"expect"})
_ATTEMPTS = 2
_NO_RETRY = {"x-should-retry": "false"}  # read by the OpenAI and Anthropic SDKs, which retry every other 502
_READY_SECONDS = 1.0
BODY_SECONDS = 30.0  # deadline for reading a request body
_LARGEST_BODIES = 64  # bodies of the largest size that are in memory at the same time
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_logger = logging.getLogger(__name__)


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


class Readiness:
    """Number of ready replicas, asked at most once in ``_READY_SECONDS``: probes need no API key."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet, self._clock = fleet, clock
        self._asked_at = 0.0
        self._asking: asyncio.Task[int] | None = None

    async def count(self) -> int:
        """All probes that arrive while replicas are asked wait for the same answer."""
        if self._asking is None or (self._asking.done() and self._clock() - self._asked_at >= _READY_SECONDS):
            self._asked_at, self._asking = self._clock(), asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> int:
        replies = await self._fleet.broadcast(ForwardedRequest("GET", "/ready"))
        return sum(start.status == HTTPStatus.OK for start, _ in replies.values())


class Gateway:
    """The ASGI application."""

    def __init__(
        self,
        fleet: Fleet,
        registry: CollectorRegistry,
        *,
        max_body_bytes: int,
        body_seconds: float = BODY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._registry = fleet, registry
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds
        self._memory, self._readiness = BodyMemory(_LARGEST_BODIES * max_body_bytes), Readiness(fleet, clock)
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
        try:
            response = await self._respond(scope, receive, send)
        except RtapError as error:
            response = error_response(error)
        if response is not None:
            await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The response; None when it was streamed, or when the client has left. Raises RtapError."""
        path, method = route_path(scope), scope["method"]
        if path in PROBE_PATHS:  # open to everybody
            return await self._probe(path, method)
        body = Body(self._memory, self._max_body_bytes, self._body_seconds)
        try:
            content = await body.read(receive) if method == "POST" else b""
            headers = [(k, v) for k, v in scope["headers"] if k not in _HOP_HEADERS]
            headers.append((b"x-request-id", current_request().request_id.encode()))  # the same for both attempts
            request = ForwardedRequest(method, path, scope["query_string"], tuple(headers), content)
            if path.rstrip("/") == "/metrics":
                return await self._metrics(request)
            if path.startswith(_BROADCAST_PATHS):
                return await self._find(request)
            return await self._forward(request, send)
        except Disconnected:
            return None
        finally:
            body.release()

    async def _probe(self, path: str, method: str) -> Response:
        """/live: always 200. /ready: 200 while at least one replica is ready."""
        if method not in ("GET", "HEAD"):
            return JSONResponse({"detail": None}, status_code=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "GET"})
        if path == "/live":
            return JSONResponse({"status": "alive"})
        number = await self._readiness.count()
        status = "ready" if number else "not ready"
        return JSONResponse({"status": status, "replicas": number}, status_code=200 if number else 503)

    async def _forward(self, request: ForwardedRequest, send: Send) -> Response | None:
        """Send a request to a replica, and to one other when that is lost before the client has received a byte.

        Never to a third: each may have been lost because of this request."""
        conversation = conversation_key(request)
        for attempt in range(_ATTEMPTS):
            self._retries.inc(attempt)
            reply = self._fleet.send(request, conversation)
            try:
                start = await anext(reply)
                assert isinstance(start, ResponseStart)
                if start.is_stream:
                    await self._stream(request.path, start, reply, send)
                    return None
                body = b"".join([part async for part in reply if isinstance(part, bytes)])
                _charge(response_tokens(body))
                return _whole_response(start, body)
            except (ReplicaLost, StopAsyncIteration) as error:
                _logger.warning("request %s lost a replica: %s", current_request().request_id, error)
            finally:
                await reply.aclose()
        error = error_body("two replicas ended on this request", status=HTTPStatus.BAD_GATEWAY)
        return JSONResponse(error, status_code=HTTPStatus.BAD_GATEWAY, headers=_NO_RETRY)

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
            return _whole_response(*refused[0])
        merged = merge_metrics({**texts, "gateway": generate_latest(self._registry).decode()})
        return Response(merged, media_type=_METRICS_TYPE)

    async def _find(self, request: ForwardedRequest) -> Response:
        """The first reply that is not a 404, else any reply."""
        replies: Sequence[tuple[ResponseStart, bytes]] = list((await self._fleet.broadcast(request)).values())
        if not replies:
            return error_response(Overloaded("no replica could answer this request; try again in a few seconds"))
        known = [reply for reply in replies if reply[0].status != 404]
        return _whole_response(*(known or replies)[0])


def _charge(tokens: int) -> None:
    """Charge tokens to the API key of the current request."""
    current_request().spent_tokens += tokens


def _whole_response(start: ResponseStart, body: bytes) -> Response:
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
