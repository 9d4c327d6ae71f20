"""Read and check the body of every POST request before a route sees it: size, JSON, field limits, blocked routes."""

import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import BodyTooLarge, Draining, InvalidRequest, RtapError
from rtap_server.engine.request_state import RequestState, current_request
from rtap_server.engine.server_state import Drain
from rtap_server.http.admission import Admission
from rtap_server.http.errors import error_response, rejection_reason
from rtap_server.http.field_limits import FieldLimits
from rtap_server.http.route_kinds import BLOCKED_PATHS, RECURSIVE_PATHS, route_path
from rtap_server.telemetry.metrics import Metrics

# Decoding and checking cost by the value, not by the byte: eight megabytes of "[]," take seconds.
MAX_CONTAINERS, MAX_STRINGS = 20_000, 50_000
_STRING_OR_CONTAINER = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]', re.DOTALL)
_NOT_JSON = (b"multipart/", b"application/x-www-form-urlencoded")


class _Disconnected(Exception):
    """The client left before its body was complete."""


class BodyLimitsMiddleware:
    """Read the body of a POST request into its RequestState, or refuse it.

    It starts no work: routes inside receive the body again from the state."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        field_limits: FieldLimits,
        admission: Admission,
        drain: Drain,
        metrics: Metrics,
        blocked_paths: Mapping[str, str] = BLOCKED_PATHS,
    ) -> None:
        self._app, self._max_body_bytes, self._field_limits = app, max_body_bytes, field_limits
        self._admission, self._drain, self._metrics, self._blocked = admission, drain, metrics, blocked_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = current_request()
        try:
            state.body, state.fields = await self._read(scope, receive)
        except _Disconnected:
            return
        except RtapError as error:
            self._metrics.count_rejected(rejection_reason(error))
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, replay(state, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, dict[str, Any]]:
        """The body and its JSON object, which is empty for a body that is not JSON."""
        path, headers = route_path(scope), dict(scope["headers"])
        if self._drain.has_begun:
            raise Draining("the server is shutting down and accepts no new requests; retry on another server")
        if path in self._blocked:
            raise InvalidRequest(f"{path} is blocked on this server: {self._blocked[path]}")
        if b"idempotency-key" in headers:
            raise InvalidRequest(
                "Idempotency-Key is not supported: leave the header out; a retry is a new request",
                param="Idempotency-Key",
            )
        if path in RECURSIVE_PATHS:
            self._admission.check()  # a full server refuses before it reads
        body = await self._read_bytes(headers, receive)
        content_type = headers.get(b"content-type", b"").strip().lower()
        is_json = path in RECURSIVE_PATHS or (bool(body) and not content_type.startswith(_NOT_JSON))
        fields = parse_json(body) if is_json else {}
        self._field_limits.check(fields)
        if path not in RECURSIVE_PATHS:
            self._field_limits.check_length(fields)
        return body, fields

    async def _read_bytes(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises BodyTooLarge as early as possible, and _Disconnected."""
        limit, parts, size = self._max_body_bytes, list[bytes](), 0
        error = BodyTooLarge(f"the request body is larger than {limit} bytes; shorten it or raise --max-body-bytes")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise error
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise _Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise error
            if not message.get("more_body", False):
                return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises InvalidRequest."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b'"') > 2 * MAX_STRINGS:
        _check_counts(body)  # the characters may all be inside one string
    try:
        decoded: Any = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the request body is nested too deep") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return cast(dict[str, Any], decoded)


def _check_counts(body: bytes) -> None:
    containers = 0
    for count, match in enumerate(_STRING_OR_CONTAINER.finditer(body), 1):
        containers += body[match.start()] != 0x22  # a quote
        if containers > MAX_CONTAINERS or count - containers > MAX_STRINGS:
            raise InvalidRequest(
                f"the request body has more than {MAX_CONTAINERS} objects and lists, or {MAX_STRINGS} strings"
            )


def replay(state: RequestState, receive: Receive) -> Receive:
    """A ``receive`` that yields ``state.body`` once, then the client's further messages, such as its disconnect."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": state.body, "more_body": False}

    return receive_again
