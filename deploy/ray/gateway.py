"""The one door of a fleet: an ASGI app that hands each request to a replica of the server and its reply back.

It stands inside ``http.auth.Gate``, which holds the keys and counts their limits for the whole fleet. A request whose
replica dies is asked again elsewhere as long as the client has seen nothing of a reply. It does not choose replicas and
knows nothing of Ray: a ``Fleet`` does.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest
from starlette._utils import get_route_path
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deploy.ray.traffic import Asked, EventReader, Head, conversation_of, labelled, tokens_of_reply
from rtap_core.errors import BodyTooLarge, Overloaded
from rtap_server.http.auth import current_visit
from rtap_server.http.errors import error_body, response_to

# What one replica alone remembers, and nobody knows which: everyone is asked.
_REMEMBERED = ("/v1/rtap/feedback", "/v1/responses/")
_OF_THIS_HOP = frozenset({b"host", b"connection", b"transfer-encoding", b"content-length", b"expect"})
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ReplicaLost(Exception):
    """The replica ended, or could not be reached, before its reply was complete."""


class Fleet(Protocol):
    """The replicas."""

    def ask(self, asked: Asked, conversation: str) -> AsyncGenerator[Head | bytes]:
        """A reply: its head, then its body in parts. The same conversation goes to the same replica while it can.
        Closing the generator aborts the request. Raises ReplicaLost."""
        ...

    async def ask_all(self, asked: Asked) -> Mapping[str, tuple[Head, bytes]]:
        """Whole replies of all replicas that answer, by the replica's name."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """attempts: how often one request is handed to a replica at most. pause_seconds: before the second time, doubled
    before each further one: Ray takes a moment to see that a replica is gone."""

    attempts: int = 6
    pause_seconds: float = 0.1
    ready_seconds: float = 4.0


class Gateway:
    """See the module."""

    def __init__(
        self, fleet: Fleet, registry: CollectorRegistry, *, max_body_bytes: int, patience: Patience | None = None
    ) -> None:
        self._fleet, self._registry, self._max_body_bytes = fleet, registry, max_body_bytes
        self._patience = patience or Patience()
        self._retries = Counter(
            "rtap_gateway_retries", "Requests handed to a further replica after one was lost.", registry=registry
        )
        self._broken = Counter(
            "rtap_gateway_broken_streams", "Streams that a lost replica left unfinished.", registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "the gateway takes HTTP only"})
            return
        path = get_route_path(scope)
        if path == "/live":
            await JSONResponse({"status": "alive"})(scope, receive, send)
            return
        asked = await self._read(scope, path, receive)
        if asked is None:
            message = f"the request body is larger than {self._max_body_bytes} bytes; shorten it"
            await response_to(BodyTooLarge(message))(scope, receive, send)
        elif path.rstrip("/") == "/metrics":
            await (await self._metrics(asked))(scope, receive, send)
        elif path == "/ready":
            await (await self._ready(asked))(scope, receive, send)
        elif path.startswith(_REMEMBERED):
            await (await self._from_any(asked))(scope, receive, send)
        else:
            await self._forward(asked, scope, receive, send)

    async def _read(self, scope: Scope, path: str, receive: Receive) -> Asked | None:
        """The whole request; None if its body is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                return None
        headers = [(k, v) for k, v in scope["headers"] if k not in _OF_THIS_HOP]
        if all(name != b"x-request-id" for name, _ in headers):
            headers.append((b"x-request-id", uuid.uuid4().hex.encode()))  # the same for every attempt
        return Asked(scope["method"], path, scope["query_string"], tuple(headers), bytes(body))

    async def _forward(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        conversation, pause = conversation_of(asked), self._patience.pause_seconds
        for attempt in range(self._patience.attempts):
            if attempt:
                self._retries.inc()
                await asyncio.sleep(pause)
                pause *= 2
            reply = self._fleet.ask(asked, conversation)
            try:
                head = await anext(reply)
                assert isinstance(head, Head)
                if head.is_stream:
                    await self._stream(asked.path, head, reply, send)
                else:
                    body = b"".join([part async for part in reply if isinstance(part, bytes)])
                    _charge(tokens_of_reply(body))
                    await _respond(head, body)(scope, receive, send)
                return
            except (ReplicaLost, StopAsyncIteration):
                continue
            finally:
                await reply.aclose()
        gone = Overloaded("no replica could answer this request; try again in a few seconds")
        await response_to(gone)(scope, receive, send)

    async def _stream(self, path: str, head: Head, reply: AsyncGenerator[Head | bytes], send: Send) -> None:
        """Pass a stream on, event by event. Raises ReplicaLost while the client has seen nothing; later the stream ends
        with an error event, because a client cannot take back what it was told."""
        reader, begun = EventReader(), False
        try:
            async for part in reply:
                assert isinstance(part, bytes)
                events = reader.feed(part)
                if events and not begun:
                    await send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
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
            await send({"type": "http.response.start", "status": head.status, "headers": list(head.headers)})
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _metrics(self, asked: Asked) -> Response:
        """Every replica's series and the gateway's own, told apart by the label ``replica``."""
        replies = await self._fleet.ask_all(asked)
        texts = {name: body.decode() for name, (head, body) in replies.items() if head.status == 200}
        refused = [reply for reply in replies.values() if reply[0].status in (401, 403)]
        if refused and not texts:
            return _respond(*refused[0])
        whole = labelled({**texts, "gateway": generate_latest(self._registry).decode()})
        return Response(whole, media_type=_METRICS_TYPE)

    async def _ready(self, asked: Asked) -> Response:
        """Ready while at least one replica is."""
        number = 0
        with contextlib.suppress(TimeoutError):
            replies = await asyncio.wait_for(self._fleet.ask_all(asked), self._patience.ready_seconds)
            number = sum(head.status == 200 for head, _ in replies.values())
        status = "ready" if number else "not ready"
        return JSONResponse({"status": status, "replicas": number}, status_code=200 if number else 503)

    async def _from_any(self, asked: Asked) -> Response:
        """The reply of the replica that knows what is asked about; any other's where none does."""
        replies: Sequence[tuple[Head, bytes]] = list((await self._fleet.ask_all(asked)).values())
        if not replies:
            return response_to(Overloaded("no replica could answer this request; try again in a few seconds"))
        known = [reply for reply in replies if reply[0].status != 404]
        return _respond(*(known or replies)[0])


def _charge(tokens: int) -> None:
    """Put ``tokens`` on the account of the key that asks."""
    visit = current_visit()
    if visit is not None:
        visit.spent_tokens += tokens


def _respond(head: Head, body: bytes) -> Response:
    """A whole reply of a replica, as it came."""
    response = Response(body, status_code=head.status)
    headers = [(k, v) for k, v in head.headers if k != b"content-length"]
    response.raw_headers = [*headers, (b"content-length", str(len(body)).encode())]
    return response


def _lost_event(path: str) -> bytes:
    """The end of a stream whose replica is gone, in the words of its endpoint."""
    message = "the replica that was answering has ended; ask again"
    error = error_body(message, status=503, type_="overloaded_error")
    if path == "/v1/messages":
        told = {"type": "error", "error": {"type": "overloaded_error", "message": message}}
        return b"event: error\ndata: " + json.dumps(told).encode() + b"\n\n"
    if path == "/v1/responses":
        told = {"type": "error", "code": "overloaded_error", "message": message, "param": None}
        return b"event: error\ndata: " + json.dumps(told).encode() + b"\n\n"
    return b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n"


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
