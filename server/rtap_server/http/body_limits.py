"""Read and check the body of every POST request before a route sees it: time, size, type, JSON, field limits."""

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import BodyTooLarge, BodyTooSlow, Draining, InvalidRequest, Overloaded, RtapError
from rtap_server.engine.request_state import RequestState, current_request
from rtap_server.engine.server_state import Drain
from rtap_server.http.admission import Admission
from rtap_server.http.errors import error_response, rejection_reason, shortened
from rtap_server.http.field_limits import MAX_CHARACTERS, MAX_CHARACTERS_ON_LOOP, FieldLimits
from rtap_server.http.route_kinds import (
    BLOCKED_PATHS,
    LIGHTWEIGHT_PATHS,
    MULTIPART_PATHS,
    RECURSIVE_PATHS,
    TOKENISING_PATHS,
    PostRoutes,
    route_path,
)
from rtap_server.telemetry.metrics import Metrics

# Decoding and checking cost by the value, not by the byte: eight megabytes of "[]," take seconds.
MAX_CONTAINERS, MAX_STRINGS = 20_000, 50_000
_STRING_OR_CONTAINER = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]', re.DOTALL)
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_BOM = b"\xef\xbb\xbf"
_JSON, _FORM = b"application/json", b"multipart/form-data"
# A body counts against BodyMemory from here on: as much as uvicorn reads ahead for every connection.
_SMALL_BODY_BYTES = 2**16


class Disconnected(Exception):
    """The client left before its body was complete."""


class BodyMemory:
    """Bytes of the large bodies in memory. limit: their sum, beyond the first 64 KiB of each.

    A small body always fits, so that clients that upload slowly cannot keep out a question."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def resize(self, before: int, after: int) -> None:
        """Count one body that had ``before`` bytes as one of ``after``. Raises Overloaded."""
        added = max(0, after - _SMALL_BODY_BYTES) - max(0, before - _SMALL_BODY_BYTES)
        if added > 0 and self.used + added > self.limit:
            raise Overloaded(
                f"the server is at its limit of {self.limit} bytes of request bodies in memory; retry in a second"
            )
        self.used += added


class BodyLimitsMiddleware:
    """Read the body of a POST request into its RequestState, or refuse it.

    It starts no work: routes inside receive the body again from the state. The body of any other request, and of a path
    without a POST route, is never kept."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Iterable[BaseRoute],
        max_body_bytes: int,
        body_timeout_seconds: float,
        memory: BodyMemory,
        field_limits: FieldLimits,
        admission: Admission,
        drain: Drain,
        metrics: Metrics,
        blocked_paths: Mapping[str, str] = BLOCKED_PATHS,
    ) -> None:
        self._app, self._posts, self._field_limits = app, PostRoutes(routes), field_limits
        self._max_body_bytes, self._timeout_seconds, self._memory = max_body_bytes, body_timeout_seconds, memory
        self._admission, self._drain, self._metrics, self._blocked = admission, drain, metrics, blocked_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, path = current_request(), route_path(scope)
        if scope["method"] != "POST" or (path not in self._posts and path not in self._blocked):
            await self._app(scope, replay(state, receive), send)
            return
        flags = ("--max-body-bytes", "--body-timeout-seconds")
        body = Body(self._memory, self._max_body_bytes, self._timeout_seconds, flags)
        try:
            try:
                scope = self._check_head(scope, path, body)
                state.body = await body.read(receive)
                state.fields = self._check_body(state.body, path)
            except Disconnected:
                return
            except RtapError as error:
                self._metrics.count_rejected(rejection_reason(error))
                await error_response(error)(scope, receive, send)
                return
            if path not in LIGHTWEIGHT_PATHS:
                body.release()  # admission bounds these
            await self._app(scope, replay(state, receive), send)
        finally:
            body.release()
            # asyncio keeps a cancelled timer for a while, and with it the context that the state is in.
            state.body, state.fields, state.messages = b"", {}, ()

    def _check_head(self, scope: Scope, path: str, body: "Body") -> Scope:
        """Refuse what needs no body for it. Returns the scope with the content type that the route expects."""
        headers = dict(scope["headers"])
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
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise InvalidRequest(
                f"Content-Encoding={_text(encoding)} is not supported; send the body uncompressed",
                param="Content-Encoding",
            )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise body.too_large()
        return _with_content_type(scope, path, headers)

    def _check_body(self, body: bytes, path: str) -> dict[str, Any]:
        """The JSON object in the body, which is empty for a form, and for no body on a route that does not recurse."""
        fields = parse_json(body) if path not in MULTIPART_PATHS and (body or path in RECURSIVE_PATHS) else {}
        self._field_limits.check(fields)
        most = None
        if path not in RECURSIVE_PATHS:
            on_loop = path in TOKENISING_PATHS or fields.get("return_token_strs")
            most = MAX_CHARACTERS_ON_LOOP if on_loop else MAX_CHARACTERS
        self._field_limits.check_length(fields, most=most)
        return fields


class Body:
    """A body that is being read, counted in a BodyMemory.

    flags: of the command line that raise the limits of bytes and seconds, for the errors."""

    def __init__(
        self, memory: BodyMemory, max_bytes: int, timeout_seconds: float, flags: tuple[str, str] | None = None
    ) -> None:
        self._memory, self._max_bytes, self._timeout_seconds, self._flags = memory, max_bytes, timeout_seconds, flags
        self._parts: list[bytes] = []
        self._size = 0

    async def read(self, receive: Receive) -> bytes:
        """The whole body. Raises BodyTooLarge, BodyTooSlow, Overloaded and Disconnected."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Disconnected
                    self._append(message.get("body", b""))
                    if self._size > self._max_bytes:
                        raise self.too_large()
                    if not message.get("more_body", False):
                        self._parts = [b"".join(self._parts)]
                        return self._parts[0]
        except TimeoutError:
            advice = "" if self._flags is None else f", or raise {self._flags[1]}"
            raise BodyTooSlow(
                f"the request body did not arrive within {self._timeout_seconds:g} s; send it faster{advice}"
            ) from None

    def too_large(self) -> BodyTooLarge:
        """The error for a body above the limit."""
        advice = "" if self._flags is None else f" or raise {self._flags[0]}"
        return BodyTooLarge(f"the request body is larger than {self._max_bytes} bytes; shorten it{advice}")

    def release(self) -> None:
        """Forget the parts and their count."""
        self._memory.resize(self._size, 0)
        self._parts, self._size = [], 0

    def _append(self, part: bytes) -> None:
        self._memory.resize(self._size, self._size + len(part))
        self._parts.append(part)
        self._size += len(part)


def _with_content_type(scope: Scope, path: str, headers: Mapping[bytes, bytes]) -> Scope:
    """The scope with the header as vLLM's routes compare it. Raises InvalidRequest for a type that they do not read.

    No type is JSON, unless a web page sends the request: a browser asks the server about JSON from another site (CORS),
    and about a request without a type it does not."""
    given = headers.get(b"content-type", b"")
    type_ = given.partition(b";")[0].strip().lower()
    if path in MULTIPART_PATHS:
        if type_ != _FORM:
            raise InvalidRequest(f"Content-Type={_text(given)}: {path} takes multipart/form-data", param="Content-Type")
        return scope
    if type_ != _JSON and (given or b"origin" in headers):
        raise InvalidRequest(f"Content-Type={_text(given)}: {path} takes application/json", param="Content-Type")
    if given == _JSON:
        return scope
    others = [header for header in scope["headers"] if header[0] != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", _JSON)]}


def _text(header: bytes) -> str:
    return shortened(header.decode("latin-1"))


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises InvalidRequest."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b'"') > 2 * MAX_STRINGS:
        _check_counts(body)  # the characters may all be inside one string
    try:
        decoded: Any = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequest("the request body is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body is not JSON: {_problem(body, error)}") from None
    if not isinstance(decoded, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return cast(dict[str, Any], decoded)


def _problem(body: bytes, error: Exception) -> str:
    """Describe why a body is not JSON. error: of the decoder."""
    if body.startswith(_BOM):
        return "it begins with a byte order mark; leave the mark out"
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"byte 0x{body[wrong.start]:02x} at position {wrong.start} is not UTF-8; encode it as UTF-8"
    if surrogate := _LONE_SURROGATE.search(body):
        return f"{surrogate[0].decode()} is half of a surrogate pair; send both halves, or the character itself"
    return f"{error}"


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
