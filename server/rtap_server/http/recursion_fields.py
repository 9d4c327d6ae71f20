"""The HTTP edge of recursion: read the ``rtap`` request field, take a place, put the ``rtap`` object into the reply.

Plain ASGI, because anything that buffers would break streaming and disconnects. It sits inside ``intake.py``, which has
read and capped the body, and outside vLLM's routes; it rewrites replies of the four endpoints that recurse only.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import msgspec
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import InvalidRequest, Overloaded, RtapError, UnknownRequest
from rtap_core.types import Policy
from rtap_server.http.admission import Admission
from rtap_server.http.auth import current_owner, current_visit
from rtap_server.http.body_limits import body_of, replay
from rtap_server.http.errors import response_to
from rtap_server.http.request_log import notes_of
from rtap_server.http.response_rewriter import EventStream, Told, annotate_reply
from rtap_server.http.route_kinds import ABORT_PATHS, RECURSIVE_PATHS, RESPONSES, RESPONSES_PATH, WORKING_PATHS
from rtap_server.http.schema import Exchange, RtapOptions, begin_exchange, effort_of, options_of, prefix_of, tokens_of
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics

_Prepared = tuple[AbstractContextManager[None], Receive, Send]


class RecursionMiddleware:
    """Around a POST that works: a place. Around a recursive one: also an Exchange, and a rewritten reply."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        metrics: Metrics,
        feedback: Feedback,
        admission: Admission,
        max_model_len: int,
    ) -> None:
        self._app, self._settings, self._metrics, self._feedback = app, settings, metrics, feedback
        self._admission, self._max_model_len = admission, max_model_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = get_route_path(scope)
        try:
            _check_owner(path)
            place, receive, send = self._prepared(path, scope, receive, send)
        except (InvalidRequest, Overloaded, UnknownRequest) as error:
            self._metrics.rejected(_REASONS[type(error)])
            await response_to(error)(scope, receive, send)
            return
        with place:
            await self._app(scope, receive, send)

    def _prepared(self, path: str, scope: Scope, receive: Receive, send: Send) -> _Prepared:
        if scope["method"] == "POST" and path in RECURSIVE_PATHS:
            return self._recursive(path, scope, receive, send)
        if scope["method"] == "POST" and path in WORKING_PATHS:
            fields = body_of(scope).fields
            params: Any = fields.get("sampling_params")
            asked = cast(dict[str, Any], params) if isinstance(params, dict) else fields
            tokens = self._tokens(asked, RtapOptions(policy=Policy.SINGLE)) if WORKING_PATHS[path] else 0
            return self._admission.admit(tokens), receive, send
        return nullcontext(), receive, send

    def _tokens(self, fields: Mapping[str, Any], options: RtapOptions | None) -> int:
        return tokens_of(fields, options, self._settings, max_model_len=self._max_model_len)

    def _recursive(self, path: str, scope: Scope, receive: Receive, send: Send) -> _Prepared:
        given = body_of(scope)
        request, body = dict(given.fields), given.raw
        if request.get("use_beam_search"):
            raise InvalidRequest(
                "beam search has no cycles to stop; leave out use_beam_search", param="use_beam_search"
            )
        if request.get("background"):
            raise InvalidRequest(
                "a response in the background would be outside this server's limits; leave out background",
                param="background",
            )
        options = options_of(request, self._settings)
        owned = _owned(request) if path == RESPONSES_PATH else {}
        if owned or "rtap" in request:
            request |= owned
            request.pop("rtap", None)  # vLLM does not know it
            body = msgspec.json.encode(request)
        model, owner = request.get("model"), current_owner()
        exchange = Exchange(
            options, effort_of(request), prefix_of(path, request), model if isinstance(model, str) else ""
        )

        def told(reply_id: str) -> None:
            self._feedback.remember(reply_id, exchange.trajectories, owner)

        place = self._admission.admit(self._tokens(request, options))
        begin_exchange(exchange)
        notes_of(scope).exchange = exchange
        return place, replay(body, receive), _Rewriter(send, path, request, exchange, told)


def _owned(request: Mapping[str, Any]) -> dict[str, Any]:
    """Where keys are asked for, a response has an id that shows whose it is, and goes on from its own key's only."""
    visit, before = current_visit(), request.get("previous_response_id")
    if visit is None:
        return {}
    if request.get("request_id") is not None:
        raise InvalidRequest("leave out request_id: this server gives responses their ids", param="request_id")
    if isinstance(before, str) and not visit.owns_response(before):
        raise UnknownRequest("previous_response_id names no response of this key")
    return {"request_id": visit.new_response_id()}


def _check_owner(path: str) -> None:
    """One key's responses and requests are no other's to read or to stop."""
    visit = current_visit()
    if visit is None:
        return
    if path.startswith(RESPONSES) and not visit.owns_response(path.removeprefix(RESPONSES).partition("/")[0]):
        raise UnknownRequest("this key has no such response")
    if path in ABORT_PATHS:
        raise InvalidRequest("requests of other keys have ids too: close the connection of the one that is to stop")


_REASONS: dict[type[RtapError], str] = {
    InvalidRequest: "invalid",
    Overloaded: "overloaded",
    UnknownRequest: "unknown",
}


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
