"""The HTTP edge of recursion: read the ``rtap`` request field, cap the body, put the ``rtap`` object into the reply.

Plain ASGI, because anything that buffers would break streaming and disconnects. It sits inside vLLM's own middleware
(keys, request ids) and outside its routes, and touches only the four endpoints that recurse.
"""

from collections.abc import Mapping
from typing import Any, cast

import msgspec
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.caps import Caps
from server.drain import Drain
from server.errors import response_to
from server.feedback import Feedback
from server.limits import Admission
from server.metrics import Metrics
from server.rtap.errors import BodyTooLarge, Draining, InvalidRequest, Overloaded
from server.settings import Settings
from server.stream import EventStream, Told, annotate_reply
from server.wire import Exchange, begin_exchange, effort_of, parse_options, prefix_of, tokens_of

RECURSIVE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_NOT_RECURSIVE = "it does not recurse; send single requests to /v1/chat/completions"
# Of vLLM's routes that it mounts whatever its flags: other ways into generation, whose replies would show everything as
# reasoning, and the one that restarts engines.
REFUSED_PATHS = {
    "/v1/chat/completions/batch": _NOT_RECURSIVE,
    "/invocations": _NOT_RECURSIVE,
    "/scale_elastic_ep": "this server scales by replicas",
    "/is_scaling_elastic_ep": "this server scales by replicas",
}


class _ClientLeft(Exception):
    """The client went away before its body was complete."""


class RecursionMiddleware:
    """Around every POST: cap its body. Around a recursive one: open an Exchange and rewrite the reply."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        metrics: Metrics,
        feedback: Feedback,
        admission: Admission,
        drain: Drain,
        max_model_len: int,
        allows_media_urls: bool,
    ) -> None:
        self._app, self._settings, self._metrics, self._feedback = app, settings, metrics, feedback
        self._admission, self._drain, self._max_model_len = admission, drain, max_model_len
        self._caps = Caps(
            settings.n_limit, settings.messages_limit, settings.allow_request_templates, allows_media_urls
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = get_route_path(scope)
        try:
            if self._drain.has_begun:
                raise Draining("the server is about to end and takes nothing new; try again, another one may answer")
            if path in RECURSIVE_PATHS:
                self._admission.check()
            body = await self._read(scope, receive)
        except Overloaded as error:
            self._metrics.rejected("draining" if isinstance(error, Draining) else "overloaded")
            await response_to(error)(scope, receive, send)
            return
        except _ClientLeft:
            return
        if body is None:
            self._metrics.rejected("body_too_large")
            limit = self._settings.max_body_bytes
            message = f"the request body is larger than {limit} bytes; shorten it or raise --max-body-bytes"
            await response_to(BodyTooLarge(message))(scope, receive, send)
            return
        if path not in RECURSIVE_PATHS and path not in REFUSED_PATHS:
            await self._app(scope, _replay(body, receive), send)
            return
        try:
            if path in REFUSED_PATHS:
                raise InvalidRequest(f"{path} is closed: {REFUSED_PATHS[path]}")
            request, body = self._parse(body)
            exchange = Exchange(request.pop("rtap_options"), effort_of(request), prefix_of(path, request))
            tokens = tokens_of(request, exchange.options, self._settings, max_model_len=self._max_model_len)
            place = self._admission.admit(tokens)
        except (InvalidRequest, Overloaded) as error:
            self._metrics.rejected("invalid" if isinstance(error, InvalidRequest) else "overloaded")
            await response_to(error)(scope, receive, send)
            return
        begin_exchange(exchange)

        def told(reply_id: str) -> None:
            self._feedback.remember(reply_id, exchange.trajectories)

        with place:
            await self._app(scope, _replay(body, receive), _Rewriter(send, path, request, exchange, told))

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is known to be too large. Raises _ClientLeft."""
        limit, parts, size = self._settings.max_body_bytes, list[bytes](), 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            return None
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    def _parse(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """(request with ``rtap_options`` in it, body without our field, which vLLM does not know)."""
        try:
            request: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"the request body is no JSON: {error}") from error
        if not isinstance(request, dict):
            raise InvalidRequest("the request body must be a JSON object")
        fields = cast(dict[str, Any], request)
        self._caps.check(fields)
        if fields.get("use_beam_search"):
            raise InvalidRequest(
                "beam search has no cycles to stop; leave out use_beam_search", param="use_beam_search"
            )
        if "rtap" not in fields:
            return {**fields, "rtap_options": None}, body
        options = parse_options(fields.pop("rtap"), self._settings)
        return {**fields, "rtap_options": options}, msgspec.json.encode(fields)


class _Rewriter:
    """The ``send`` of a recursive exchange."""

    def __init__(self, send: Send, path: str, request: Mapping[str, Any], exchange: Exchange, told: Told) -> None:
        self._send, self._path, self._request, self._exchange, self._told = send, path, request, exchange, told
        self._start: Message | None = None
        self._stream: EventStream | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or (self._stream is None and self._start is None):
            await self._send(message)
        elif self._stream is not None:
            body = self._stream.feed(message.get("body", b""))
            if body or not message.get("more_body", False):
                await self._send({**message, "body": body})
        else:
            await self._gather(message)

    async def _begin(self, message: Message) -> None:
        kind = dict(message["headers"]).get(b"content-type", b"")
        if message["status"] != 200:
            await self._send(message)
        elif kind.startswith(b"text/event-stream"):
            self._stream = EventStream(self._path, self._request, self._exchange, self._told)
            await self._send(message)
        else:
            self._start = message  # its content-length is known only with the whole body

    async def _gather(self, message: Message) -> None:
        assert self._start is not None
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = annotate_reply(b"".join(self._parts), self._path, self._exchange, self._told)
        headers = [(k, v) for k, v in self._start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then whatever the client does next (its leaving, above all)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
