"""Events of a chat stream: ``thinking``, ``draft``, ``answer``, ``tool_call``, ``cycle`` and ``done``.

Works on the streams of ``RTAP`` and of the plain openai SDK.
"""

from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

from openai import AsyncStream, OpenAIError, Stream
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from rtap_client.types import Cycle, CycleUpdate, Draft, DraftUpdate, Trajectory, trajectory


class IncompleteStream(OpenAIError):
    """The stream ended before the answer was complete: the server or a proxy was stopped."""


@dataclass(frozen=True, slots=True)
class ThinkingEvent:
    """Reasoning text, or the text of an answer that was not accepted."""

    text: str
    choice: int
    type: Literal["thinking"] = "thinking"


@dataclass(frozen=True, slots=True)
class DraftEvent:
    """New text of an answer that is still to be judged, in a stream with ``rtap={"drafts": True}``.

    The CycleEvent with its index ends it; AnswerEvents bring the accepted answer."""

    draft: Draft
    choice: int
    type: Literal["draft"] = "draft"


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """Text of the accepted answer."""

    text: str
    choice: int
    type: Literal["answer"] = "answer"


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """Part of a tool call."""

    call: ChoiceDeltaToolCall
    choice: int
    type: Literal["tool_call"] = "tool_call"


@dataclass(frozen=True, slots=True)
class CycleEvent:
    """A finished and scored cycle."""

    cycle: Cycle
    choice: int
    type: Literal["cycle"] = "cycle"


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """End of a stream, with the answer of the first choice.

    rtap: the first choice's trajectory; None if the server is not an rtap server.
    trajectories: of every choice.
    usage: None unless the request set ``stream_options={"include_usage": True}``.
    """

    id: str
    text: str
    finish_reason: str
    rtap: Trajectory | None
    trajectories: tuple[Trajectory, ...]
    usage: CompletionUsage | None
    type: Literal["done"] = "done"


Event = ThinkingEvent | DraftEvent | AnswerEvent | ToolCallEvent | CycleEvent | DoneEvent


@dataclass(slots=True)
class EventReader:
    """Converter for one stream: call ``read`` with each chunk, then ``done``."""

    _id: str = ""
    _text: list[str] = field(default_factory=list[str])
    _finish_reason: str | None = None
    _rtap: Trajectory | None = None
    _trajectories: tuple[Trajectory, ...] = ()
    _usage: CompletionUsage | None = None

    def read(self, chunk: ChatCompletionChunk) -> Iterator[Event]:
        """Yield the events of one chunk."""
        self._id = chunk.id or self._id
        self._usage = chunk.usage or self._usage
        self._read_trajectories(chunk)
        update = _update(chunk)
        for choice in chunk.choices:
            delta = choice.delta
            if choice.index == 0:
                self._finish_reason = choice.finish_reason or self._finish_reason
                self._text += [delta.content] if delta.content else []
            if isinstance(update, Draft):
                yield DraftEvent(update, choice.index)
            elif update is not None:
                yield CycleEvent(update, choice.index)
            reasoning = cast(str | None, getattr(delta, "reasoning", None))
            if reasoning:
                yield ThinkingEvent(reasoning, choice.index)
            if delta.content:
                yield AnswerEvent(delta.content, choice.index)
            for call in delta.tool_calls or ():
                yield ToolCallEvent(call, choice.index)

    def done(self) -> DoneEvent:
        """Return the last event. Raises IncompleteStream if the first choice did not finish."""
        if self._finish_reason is None:
            raise IncompleteStream("the stream ended before the answer was complete; send the request again")
        return DoneEvent(
            self._id, "".join(self._text), self._finish_reason, self._rtap, self._trajectories, self._usage
        )

    def _read_trajectories(self, chunk: ChatCompletionChunk) -> None:
        first = trajectory(chunk)
        if first is not None:
            every: Any = getattr(chunk, "rtap_choices", None)
            self._rtap = first
            self._trajectories = tuple(_as_trajectory(t) for t in every) if every else (first,)


def _as_trajectory(value: Any) -> Trajectory:
    return value if isinstance(value, Trajectory) else Trajectory.construct(**value)


def _update(chunk: ChatCompletionChunk) -> Cycle | Draft | None:
    """The finished cycle, or the draft, of one chunk."""
    update: Any = getattr(chunk, "rtap", None)
    if isinstance(update, CycleUpdate):
        return update.cycle
    if isinstance(update, DraftUpdate):
        return update.draft
    fields = cast(dict[str, Any], update) if isinstance(update, dict) else {}
    match fields.get("event"):
        case "cycle":
            return Cycle.construct(**fields["cycle"])
        case "draft":
            return Draft.construct(**fields["draft"])
        case _:
            return None


@overload
def events(stream: Stream[Any]) -> Generator[Event]: ...


@overload
def events(stream: AsyncStream[Any]) -> AsyncGenerator[Event]: ...


def events(stream: Stream[Any] | AsyncStream[Any]) -> Generator[Event] | AsyncGenerator[Event]:
    """Yield the events of ``client.chat.completions.create(…, stream=True)``, ending with a DoneEvent.

    Leaving the iteration early closes the connection, and the server aborts the request.
    Raises IncompleteStream, and the SDK's exceptions when the server reports an error.
    """
    return _events(stream) if isinstance(stream, Stream) else _async_events(stream)


def _events(stream: Stream[Any]) -> Generator[Event]:
    reader = EventReader()
    try:
        for chunk in stream:
            yield from reader.read(chunk)
    finally:
        stream.close()
    yield reader.done()


async def _async_events(stream: AsyncStream[Any]) -> AsyncGenerator[Event]:
    reader = EventReader()
    try:
        async for chunk in stream:
            for event in reader.read(chunk):
                yield event
    finally:
        await stream.close()
    yield reader.done()
