"""The HTTP parser with limits on what comes before a body: request line, header fields, trailers.

uvicorn's parser in C takes heads of any size, and vLLM's ``--h11-…`` flags bind another one. Here whoever sends more
gets 431, and memory holds no more of it than the limit and one read. What is no HTTP at all gets 400. It knows nothing
of routes and keys.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rtap_core.errors import HeadTooLarge, InvalidRequest, RtapError
from rtap_server.http.errors import response_to

_LINGER_SECONDS = 1.0  # for a client that is still sending to read why; a close at once would take the answer with it
_FIELD_BYTES, _LINE_BYTES = 4, 16  # besides name and value; besides the target, in a request line


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """max_bytes: request line and fields, of one request. max_fields: how many of these."""

    max_bytes: int
    max_fields: int


def bounded_http(limits: HeadLimits, new_id: Callable[[], str]) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's ``http``. new_id: of a refusal, as its ``x-request-id``."""

    class Bounded(BoundedHttp):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.limits, self.new_id = limits, new_id

    return Bounded


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol on httptools. The parser calls the ``on_…`` methods from inside ``data_received``."""

    limits: HeadLimits
    new_id: Callable[[], str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bytes = self._fields = 0  # of the request that is being read
        self._open_bytes = 0  # what the parser was given and has not told of: a field without its end, say
        self._told_bytes = 0  # of the bytes that are being parsed
        self._is_in_head = self._is_refused = False
        self._why: RtapError | None = None

    def data_received(self, data: bytes) -> None:
        """Bytes of the connection, as they come."""
        if self._is_refused:
            return
        self._told_bytes = 0
        super().data_received(data)
        if self._is_in_head:
            self._open_bytes = max(0, self._open_bytes + len(data) - self._told_bytes)
        else:  # a body, whose own framing and trailers the parser does not tell of
            self._open_bytes = 0 if self._told_bytes else self._open_bytes + len(data)
        if self._open_bytes > self.limits.max_bytes and not self._is_refused:
            self._refuse(self._too_long())

    def on_message_begin(self) -> None:
        """A further request of this connection."""
        self._is_in_head, self._bytes, self._fields = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole field of the head, or of the trailers of a chunked body."""
        self._count(len(name) + len(value) + _FIELD_BYTES, 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The end of the head; the application begins."""
        self._is_in_head = False
        self._told_bytes += _LINE_BYTES
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body; how much of that is taken is the application's to say."""
        self._told_bytes += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words are for its own log
        """Called for all that stops the parser, what is raised here included."""
        self._refuse(self._why or InvalidRequest("this is not a valid HTTP/1.1 request"))

    def _count(self, size: int, fields: int) -> None:
        self._told_bytes += size
        self._bytes += size
        self._fields += fields
        if self._bytes > self.limits.max_bytes:
            self._why = self._too_long()
        elif self._fields > self.limits.max_fields:
            self._why = HeadTooLarge(
                f"the request has more than {self.limits.max_fields} header fields; send fewer, or raise "
                "--max-header-fields"
            )
        if self._why is not None:
            raise self._why  # the parser stops, and send_400_response is called

    def _too_long(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"the request's head is longer than {self.limits.max_bytes} bytes; shorten it, or raise --max-header-bytes"
        )

    def _refuse(self, error: RtapError) -> None:
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.close()  # an answer to an earlier request is on its way: this one has no place in it
            return
        reply = response_to(error)
        fields = [*reply.raw_headers, (b"connection", b"close"), (b"x-request-id", self.new_id().encode())]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(STATUS_LINE[reply.status_code] + head + b"\r\n" + bytes(reply.body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
