"""Put trajectories into replies that vLLM has framed: whole JSON bodies, and server-sent events one by one.

Streams stay ordinary OpenAI chunks. Only events that need a change are decoded; content deltas pass as bytes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from rtap_server.http.errors import shaped_event
from rtap_server.http.schema import (
    ANSWER_MARK,
    REASONING,
    REASONING_CONTENT,
    Exchange,
    cycle_object,
    reasoning_tokens,
    trajectory_object,
)

_DATA, _DONE, _ERROR = b"data: ", b"data: [DONE]", b'data: {"error"'
_NAMED_ERROR = b"event: error\n" + _DATA  # Anthropic's
_CHAT, _COMPLETIONS, _RESPONSES, _MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
# What an event must contain to be worth decoding: a finish or usage to complete. Nothing that a model writes looks like
# it: within a JSON string the quotes are escaped.
_MARKERS: Mapping[str, re.Pattern[bytes]] = {
    _CHAT: re.compile(b'"finish_reason":"|"usage":{'),
    _COMPLETIONS: re.compile(b'"finish_reason":"|"usage":{'),
    _RESPONSES: re.compile(b'"response.(?:completed|incomplete)"'),
    _MESSAGES: re.compile(b'"message_(?:start|delta)"'),
}
Told = Callable[[str], None]
"""Called with a reply's id when its trajectories are told, before the bytes that tell them are sent."""


def annotate_reply(body: bytes, path: str, exchange: Exchange, told: Told) -> bytes:
    """A whole 200 reply with its ``rtap`` object, both reasoning names and the true reasoning token count.

    A body that is no JSON object, or an exchange that never reached the engine, comes back as it was."""
    if not exchange.trajectories:
        return body
    try:
        reply: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body
    if not isinstance(reply, dict):
        return body
    fields = cast(dict[str, Any], reply)
    for choice in fields.get("choices") or ():
        message = choice.get("message")
        if isinstance(message, dict) and REASONING in message:
            message[REASONING_CONTENT] = message[REASONING]
        if len(exchange.trajectories) > 1 and choice["index"] in exchange.trajectories:
            choice["rtap"] = _trajectory(exchange, choice["index"])
    _complete_usage(fields.get("usage"), path, exchange)
    fields["rtap"] = _trajectory(exchange, 0)
    told(fields["id"])
    return msgspec.json.encode(fields)


class EventStream:
    """Rewrites one stream. ``feed`` takes bytes as vLLM sends them and gives bytes to send, event by event."""

    def __init__(self, path: str, request: Mapping[str, Any], exchange: Exchange, told: Told) -> None:
        self._path, self._exchange, self._told = path, exchange, told
        self._markers = _MARKERS[path]
        self._held = bytearray()
        self._head: dict[str, Any] | None = None
        self._finished = 0
        self._message_id = ""
        options = request.get("stream_options")
        self._usage_follows = isinstance(options, dict) and bool(cast(dict[str, Any], options).get("include_usage"))

    def feed(self, data: bytes) -> bytes:
        """Events that are complete with ``data``, rewritten; cycle events that happened before them first."""
        if not self._held and 0 < data.find(b"\n\n") == len(data) - 2:
            return self._event(data[:-2])  # as nearly all come: one, whole
        looked_at = max(0, len(self._held) - 1)  # up to here no event ends
        self._held += data
        end = self._held.rfind(b"\n\n", looked_at)
        if end < 0:
            return b""
        events = bytes(self._held[:end])
        del self._held[: end + 2]
        return b"".join(self._event(event) for event in events.split(b"\n\n"))

    def _event(self, event: bytes) -> bytes:
        cycles = self._cycle_events(event) if self._exchange.pending else b""
        if event.startswith(_ERROR):
            event = _DATA + shaped_event(event[len(_DATA) :])
        elif self._path == _MESSAGES and event.startswith(_NAMED_ERROR):
            event = _NAMED_ERROR + shaped_event(event[len(_NAMED_ERROR) :])
        elif event != _DONE and self._markers.search(event):
            event = self._rewrite(event)
        return cycles + event + b"\n\n"

    def _rewrite(self, event: bytes) -> bytes:
        start = event.find(_DATA) + len(_DATA)
        chunk: dict[str, Any] = msgspec.json.decode(event[start:])
        if self._path in (_CHAT, _COMPLETIONS):
            for choice in chunk.get("choices") or ():
                if choice.get("text") == ANSWER_MARK:  # the end of a choice that has none
                    choice["text"] = ""
                self._finished += choice.get("finish_reason") is not None
            _complete_usage(chunk.get("usage"), self._path, self._exchange)
            if self._is_last(chunk):
                self._attach(chunk)
        elif chunk["type"] == "message_start":
            self._message_id = chunk["message"]["id"]
        else:
            reply = chunk.get("response", chunk)
            _complete_usage(reply.get("usage"), self._path, self._exchange)
            reply["rtap"] = _trajectory(self._exchange, 0)
            self._told(reply.get("id", self._message_id))
        return event[:start] + msgspec.json.encode(chunk)

    def _is_last(self, chunk: dict[str, Any]) -> bool:
        if self._usage_follows:
            return not chunk.get("choices")
        ended = any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
        return ended and self._finished == max(1, self._exchange.num_choices)

    def _attach(self, chunk: dict[str, Any]) -> None:
        chunk["rtap"] = _trajectory(self._exchange, 0)
        if len(self._exchange.trajectories) > 1:
            chunk["rtap_choices"] = [_trajectory(self._exchange, i) for i in sorted(self._exchange.trajectories)]
        self._told(chunk["id"])

    def _cycle_events(self, event: bytes) -> bytes:
        """One chunk with an empty delta for each cycle that ended since the last event (chat only)."""
        pending, options = self._exchange.pending, self._exchange.options
        if self._path != _CHAT:
            pending.clear()
            return b""
        if self._head is None:
            if not event.startswith(_DATA + b"{"):
                return b""
            first: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
            if "id" not in first:
                return b""  # an error, not a chunk
            self._head = {k: first[k] for k in ("id", "object", "created", "model")}
        chunks: list[bytes] = []
        while pending:
            index, cycle = pending.popleft()
            shown = cycle_object(cycle, with_think=bool(options and options.return_cycles))
            choice: dict[str, Any] = {"index": index, "delta": {}, "finish_reason": None}
            chunk: dict[str, Any] = self._head | {"choices": [choice], "rtap": {"event": "cycle", "cycle": shown}}
            chunks.append(_DATA + msgspec.json.encode(chunk) + b"\n\n")
        return b"".join(chunks)


def _trajectory(exchange: Exchange, choice: int) -> dict[str, Any] | None:
    trajectory, options = exchange.trajectories.get(choice), exchange.options
    if trajectory is None:
        return None
    return trajectory_object(trajectory, with_think=bool(options and options.return_cycles))


def _complete_usage(usage: Any, path: str, exchange: Exchange) -> None:
    """vLLM cannot tell from token ids which answers were returned; the trajectories can."""
    if not isinstance(usage, dict) or path in (_COMPLETIONS, _MESSAGES) or not exchange.trajectories:
        return
    details = "output_tokens_details" if path == _RESPONSES else "completion_tokens_details"
    tokens = sum(reasoning_tokens(t) for t in exchange.trajectories.values())
    usage[details] = {**(cast(dict[str, Any], usage).get(details) or {}), "reasoning_tokens": tokens}
