"""Add trajectories to responses that vLLM has written: whole JSON bodies, and server-sent events one by one.

Streams stay ordinary OpenAI chunks. Only events that need a change are decoded; content deltas pass as bytes.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import msgspec
from starlette.types import Message, Send

from rtap_server.engine.output_writer import ANSWER_MARK, DRAFT, REASONING, REASONING_CONTENT
from rtap_server.engine.request_state import RequestState
from rtap_server.http.errors import shape_error_event
from rtap_server.http.schema import cycle_object, trajectory_object
from rtap_server.telemetry.feedback import Feedback

_DATA, _DONE, _ERROR = b"data: ", b"data: [DONE]", b'data: {"error"'
_NAMED_ERROR = b"event: error\n" + _DATA  # Anthropic's
_CHAT, _COMPLETIONS, _RESPONSES, _MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
# An event that matches has something to complete or to correct. A model's text cannot match: its quotes are escaped.
_NEEDS_REWRITE: Mapping[str, re.Pattern[bytes]] = {
    _CHAT: re.compile(rb'"finish_reason":"|"usage":{|"logprobs":{|"tool_calls":\[{|"delta":{"draft":{'),
    _COMPLETIONS: re.compile(b'"finish_reason":"|"usage":{'),
    _RESPONSES: re.compile(rb'"response.(?:completed|incomplete)"|"logprobs":\[{'),
    _MESSAGES: re.compile(b'"message_(?:start|delta)"'),
}
# Held back until the next event shows whether the response was cut in this item.
_ITEM_DONE = b"event: response.output_item.done\n"
_MARK_BYTES = list(ANSWER_MARK.encode())
_NEVER = re.compile(b"(?!)")  # for requests that do not recurse


class ResponseRewriter:
    """The ASGI ``send`` of a request that runs a model. Error responses pass unchanged.

    Of a request that does not recurse, only error events of a stream change.

    Feedback remembers the trajectories before the bytes that report them are sent."""

    def __init__(self, send: Send, path: str, state: RequestState, feedback: Feedback) -> None:
        self._send, self._path, self._state, self._feedback = send, path, state, feedback
        self._start: Message | None = None
        self._stream: EventStream | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or (self._stream is None and self._start is None):
            await self._send(message)
        elif self._stream is not None:
            is_last = not message.get("more_body", False)
            body = self._stream.feed(message.get("body", b"")) + (self._stream.close() if is_last else b"")
            if body or is_last:
                await self._send({**message, "body": body})
        else:
            await self._collect(message)

    async def _begin(self, message: Message) -> None:
        content_type = dict(message["headers"]).get(b"content-type", b"")
        is_stream = content_type.startswith(b"text/event-stream")
        if message["status"] != 200 or not (is_stream or self._path in _NEEDS_REWRITE):
            await self._send(message)
        elif is_stream:
            self._stream = EventStream(self._path, self._state, self._feedback)
            await self._send(message)
        else:
            self._start = message  # its content-length is known only with the whole body

    async def _collect(self, message: Message) -> None:
        assert self._start is not None
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = annotate_body(b"".join(self._parts), self._path, self._state, self._feedback)
        headers = [(k, v) for k, v in self._start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def annotate_body(body: bytes, path: str, state: RequestState, feedback: Feedback) -> bytes:
    """A whole 200 response with its ``rtap`` object, both reasoning fields and the true reasoning token count.

    Unchanged when it is not a JSON object, or when the request never reached the engine."""
    if not state.trajectories:
        return body
    try:
        decoded: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body
    if not isinstance(decoded, dict):
        return body
    fields = cast(dict[str, Any], decoded)
    for choice in fields.get("choices") or ():
        message = choice.get("message")
        if isinstance(message, dict) and REASONING in message:
            message[REASONING_CONTENT] = message[REASONING]
        if len(state.trajectories) > 1 and choice["index"] in state.trajectories:
            choice["rtap"] = _trajectory(state, choice["index"])
        if path == _CHAT:
            _keep_content(choice.get("logprobs"), "content")
            if choice.get("finish_reason") == "tool_calls" and not choice["message"].get("tool_calls"):
                choice["finish_reason"] = "stop"  # vLLM says so of every answer to tool_choice "required"
    if path == _RESPONSES:
        _correct_items(fields)
    has_call = any(block.get("type") == "tool_use" for block in fields.get("content") or ())
    if path == _MESSAGES and fields.get("stop_reason") == "tool_use" and not has_call:
        fields["stop_reason"] = "end_turn"
    _complete_usage(fields.get("usage"), path, state)
    _attach(fields, state)
    feedback.remember(fields["id"], state.trajectories, state.owner)
    return msgspec.json.encode(fields)


class EventStream:
    """Rewrite one stream. ``feed`` takes bytes as vLLM sends them and returns the bytes to send."""

    def __init__(self, path: str, state: RequestState, feedback: Feedback) -> None:
        self._path, self._state, self._feedback = path, state, feedback
        self._needs_rewrite = _NEEDS_REWRITE.get(path, _NEVER)
        self._buffer = bytearray()
        self._chunk_head: dict[str, Any] | None = None
        self._num_finished = 0
        self._done_item = b""
        self._message_id = ""
        options = state.fields.get("stream_options")
        self._has_usage_chunk = isinstance(options, dict) and bool(cast(dict[str, Any], options).get("include_usage"))

    def feed(self, data: bytes) -> bytes:
        """Events that ``data`` completes, rewritten, each after the cycle events that preceded it."""
        if not self._buffer and 0 < data.find(b"\n\n") == len(data) - 2:
            return self._event(data[:-2])  # nearly always: one whole event
        searched = max(0, len(self._buffer) - 1)
        self._buffer += data
        end = self._buffer.rfind(b"\n\n", searched)
        if end < 0:
            return b""
        events = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return b"".join(self._event(event) for event in events.split(b"\n\n"))

    def close(self) -> bytes:
        """The rest, when no further event comes."""
        done, self._done_item = self._done_item, b""
        return done

    def _event(self, event: bytes) -> bytes:
        if event.startswith(_ITEM_DONE):
            done, self._done_item = self._done_item, self._rewritten(event) + b"\n\n"
            return done
        cycles = self._cycle_events(event) if self._state.cycles else b""
        if event.startswith(_ERROR):
            event = _DATA + shape_error_event(event[len(_DATA) :], self._state.request_id)
        elif self._path == _MESSAGES and event.startswith(_NAMED_ERROR):
            event = _NAMED_ERROR + shape_error_event(event[len(_NAMED_ERROR) :], self._state.request_id)
        elif event != _DONE:
            event = self._rewritten(event)
        return self.close() + cycles + event + b"\n\n"

    def _rewritten(self, event: bytes) -> bytes:
        if not self._needs_rewrite.search(event):
            return event
        start = event.find(_DATA) + len(_DATA)
        chunk: dict[str, Any] = msgspec.json.decode(event[start:])
        rewrite = {_RESPONSES: self._rewrite_response_event, _MESSAGES: self._rewrite_message_event}
        rewrite.get(self._path, self._rewrite_chunk)(chunk)
        name = b"event: " + chunk["type"].encode() + b"\n" if event.startswith(b"event: ") else b""
        return name + _DATA + msgspec.json.encode(chunk)

    def _rewrite_chunk(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            if choice.get("text") == ANSWER_MARK:  # the last chunk of a choice without text
                choice["text"] = ""
            if self._path == _CHAT:
                _join_tool_calls(choice["delta"])
                if (draft := choice["delta"].pop(DRAFT, None)) is not None:
                    chunk["rtap"] = {"event": "draft", "draft": draft}
                _keep_content(choice.get("logprobs"), "content")
                if choice.get("logprobs") == {"content": []}:
                    choice["logprobs"] = None
            self._num_finished += choice.get("finish_reason") is not None
        _complete_usage(chunk.get("usage"), self._path, self._state)
        if self._is_last(chunk):
            self._attach(chunk, chunk["id"])

    def _rewrite_message_event(self, event: dict[str, Any]) -> None:
        if event["type"] == "message_start":
            self._message_id = event["message"]["id"]
        else:
            self._attach(event, self._message_id)

    def _rewrite_response_event(self, event: dict[str, Any]) -> None:
        item: dict[str, Any] = event.get("item") or {}
        for part in (event, event.get("part"), *(item.get("content") or ())):
            _keep_content(part, "logprobs")
        response = event.get("response")
        if response is None:
            return
        if _correct_items(response):
            event["type"] = "response.incomplete"
            self._done_item = _cut_item(self._done_item)
        _complete_usage(response.get("usage"), self._path, self._state)
        self._attach(response, response["id"])

    def _is_last(self, chunk: dict[str, Any]) -> bool:
        if self._has_usage_chunk:
            return not chunk.get("choices")
        is_end = any(choice.get("finish_reason") for choice in chunk.get("choices") or ())
        return is_end and self._num_finished == max(1, self._state.num_choices)

    def _attach(self, shown: dict[str, Any], response_id: str) -> None:
        _attach(shown, self._state)
        self._feedback.remember(response_id, self._state.trajectories, self._state.owner)

    def _cycle_events(self, event: bytes) -> bytes:
        """One chunk with an empty delta for each cycle that ended since the last event (chat only)."""
        cycles = self._state.cycles
        if self._path != _CHAT:
            cycles.clear()
            return b""
        if self._chunk_head is None:
            if not event.startswith(_DATA + b"{"):
                return b""
            first: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
            if "id" not in first:
                return b""  # an error
            self._chunk_head = {k: first[k] for k in ("id", "object", "created", "model")}
        chunks: list[bytes] = []
        while cycles:
            index, cycle = cycles.popleft()
            shown = cycle_object(cycle, with_think=self._state.return_cycles)
            choice: dict[str, Any] = {"index": index, "delta": {}, "finish_reason": None}
            chunk: dict[str, Any] = self._chunk_head | {"choices": [choice], "rtap": {"event": "cycle", "cycle": shown}}
            chunks.append(_DATA + msgspec.json.encode(chunk) + b"\n\n")
        return b"".join(chunks)


def _trajectory(state: RequestState, choice: int) -> dict[str, Any] | None:
    trajectory = state.trajectories.get(choice)
    return None if trajectory is None else trajectory_object(trajectory, with_think=state.return_cycles)


def _attach(shown: dict[str, Any], state: RequestState) -> None:
    """Add the trajectory of the first choice and, if there are several, all of them."""
    shown["rtap"] = _trajectory(state, 0)
    if len(state.trajectories) > 1:
        shown["rtap_choices"] = [_trajectory(state, i) for i in sorted(state.trajectories)]


def _keep_content(fields: Any, name: str) -> None:
    """Remove log-probabilities of tokens that are not in the content."""
    if isinstance(fields, dict) and (entries := cast(dict[str, Any], fields).get(name)):
        fields[name] = [e for e in entries if e.get("token") != ANSWER_MARK and e.get("bytes") != _MARK_BYTES]


def _join_tool_calls(delta: dict[str, Any]) -> None:
    """One entry for each tool call: clients read only one for an index in a chunk.

    vLLM's parsers send two when one output has the name and the beginning of the arguments."""
    joined: dict[int, dict[str, Any]] = {}
    for call in delta.get("tool_calls") or ():
        first = joined.setdefault(call["index"], call)
        if first is not call:
            function, more = first["function"], call["function"]
            function["arguments"] = (function.get("arguments") or "") + (more.get("arguments") or "")
    if joined:
        delta["tool_calls"] = list(joined.values())


def _correct_items(response: dict[str, Any]) -> bool:
    """True if a response was cut. vLLM says of its last item, which is cut too, that it is complete."""
    is_cut = response.get("status") == "incomplete"
    output = response.get("output") or ()
    if is_cut and output:
        output[-1]["status"] = "incomplete"
    for item in output:
        for part in item.get("content") or ():
            _keep_content(part, "logprobs")
    return is_cut


def _cut_item(event: bytes) -> bytes:
    """The event that ends an item which was cut."""
    start = event.find(_DATA) + len(_DATA)
    if start < len(_DATA):
        return event
    chunk: dict[str, Any] = msgspec.json.decode(event[start:])
    chunk["item"]["status"] = "incomplete"
    return event[:start] + msgspec.json.encode(chunk) + b"\n\n"


def _complete_usage(usage: Any, path: str, state: RequestState) -> None:
    """Set the reasoning tokens: vLLM cannot tell from token ids which answers were returned."""
    if not isinstance(usage, dict) or path in (_COMPLETIONS, _MESSAGES) or not state.trajectories:
        return
    details = "output_tokens_details" if path == _RESPONSES else "completion_tokens_details"
    tokens = sum(t.reasoning_tokens for t in state.trajectories.values())
    usage[details] = {**(cast(dict[str, Any], usage).get(details) or {}), "reasoning_tokens": tokens}
