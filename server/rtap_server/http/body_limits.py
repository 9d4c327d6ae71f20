"""Every POST before anything else looks at it: is the path open, the body small and JSON, does it ask for too much.

Plain ASGI, inside the gate and outside all that does work. What passes is in the scope for the layers inside
(``body_of``), decoded once. It admits nothing and starts nothing.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import BodyTooLarge, Draining, InvalidRequest, Overloaded, RtapError
from rtap_server.engine.drain import Drain
from rtap_server.http.admission import Admission
from rtap_server.http.errors import response_to
from rtap_server.http.field_limits import Caps
from rtap_server.http.privacy import texts_of, without
from rtap_server.http.request_id import ErrorShaper
from rtap_server.http.route_kinds import RECURSIVE_PATHS, REFUSED_PATHS
from rtap_server.telemetry.metrics import Metrics

# Decoding, walking and checking cost by the value, not by the byte: of eight megabytes of "[]," they take seconds.
MOST_CONTAINERS, MOST_STRINGS = 20_000, 50_000
_PIECES = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]', re.DOTALL)
_NO_JSON = (b"multipart/", b"application/x-www-form-urlencoded")
_SCOPE_KEY = "rtap.body"


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body. fields: decoded, empty where it is none or no JSON (a form, say)."""

    raw: bytes
    fields: dict[str, Any]


class _ClientLeft(Exception):
    """The client went away before its body was complete."""


class Intake:
    """Around every POST."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        caps: Caps,
        admission: Admission,
        drain: Drain,
        metrics: Metrics,
    ) -> None:
        self._app, self._max_body_bytes, self._caps = app, max_body_bytes, caps
        self._admission, self._drain, self._metrics = admission, drain, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._take(scope, receive)
        except _ClientLeft:
            return
        except (InvalidRequest, BodyTooLarge, Overloaded) as error:
            self._metrics.rejected(_REASONS[type(error)])
            await response_to(error)(scope, receive, send)
            return

        def clean(message: str) -> str:
            return without(message, texts_of(body.fields))

        await self._app({**scope, _SCOPE_KEY: body}, replay(body.raw, receive), ErrorShaper(send, clean))

    async def _take(self, scope: Scope, receive: Receive) -> Body:
        path, headers = get_route_path(scope), dict(scope["headers"])
        if self._drain.has_begun:
            raise Draining("the server is about to end and takes nothing new; try again, another one may answer")
        if path in REFUSED_PATHS:
            raise InvalidRequest(f"{path} is closed: {REFUSED_PATHS[path]}")
        # A full server says so before it reads; to whoever may only want what is there already, after that.
        if path in RECURSIVE_PATHS and b"idempotency-key" not in headers:
            self._admission.check()
        raw = await self._read(headers, receive)
        kind = headers.get(b"content-type", b"").strip().lower()
        is_json = path in RECURSIVE_PATHS or (bool(raw) and not kind.startswith(_NO_JSON))
        fields = parse(raw) if is_json else {}
        self._caps.check(fields)
        if path not in RECURSIVE_PATHS:
            self._caps.check_length(fields)
        return Body(raw, fields)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as it is known to be that, and _ClientLeft."""
        limit, parts, size = self._max_body_bytes, list[bytes](), 0
        error = BodyTooLarge(f"the request body is larger than {limit} bytes; shorten it or raise --max-body-bytes")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise error
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise error
            if not message.get("more_body", False):
                return b"".join(parts)


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that it is. Raises InvalidRequest."""
    if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS or raw.count(b'"') > 2 * MOST_STRINGS:
        _check_pieces(raw)  # they may all be in one text
    try:
        request: Any = msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest("the request body is nested too deep") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return cast(dict[str, Any], request)


def _check_pieces(raw: bytes) -> None:
    containers = 0
    for pieces, piece in enumerate(_PIECES.finditer(raw), 1):
        containers += raw[piece.start()] != 0x22  # a quote
        if containers > MOST_CONTAINERS or pieces - containers > MOST_STRINGS:
            raise InvalidRequest(
                f"the request body has more than {MOST_CONTAINERS} objects and lists, or {MOST_STRINGS} texts"
            )


def body_of(scope: Scope) -> Body:
    """The body of a POST that came through an Intake."""
    return scope[_SCOPE_KEY]


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then whatever the client does next (its leaving, above all)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


_REASONS: dict[type[RtapError], str] = {
    InvalidRequest: "invalid",
    BodyTooLarge: "body_too_large",
    Draining: "draining",
    Overloaded: "overloaded",
}
