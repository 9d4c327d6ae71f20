"""A stream of chat chunks as events: ``thinking``, ``answer``, ``tool_call``, ``cycle``, ``done``.

Works on the streams of ``RTAP`` and of the plain openai SDK. It asks for nothing by itself.
"""

from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

from openai import AsyncStream, OpenAIError, Stream
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from rtap_client.types import Cycle, CycleNote, Trajectory, trajectory


class IncompleteStream(OpenAIError):
    """A stream that ended before its answer did: the server or something between was stopped."""


@dataclass(frozen=True, slots=True)
class ThinkingEvent:
    """A piece of reasoning, or an answer that was not accepted."""

    text: str
    choice: int
    type: Literal["thinking"] = "thinking"


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """A piece of the accepted answer."""

    text: str
    choice: int
    type: Literal["answer"] = "answer"


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """A piece of a tool call, which is an answer too."""

    call: ChoiceDeltaToolCall
    choice: int
    type: Literal["tool_call"] = "tool_call"


@dataclass(frozen=True, slots=True)
class CycleEvent:
    """A cycle has ended and was judged."""

    cycle: Cycle
    choice: int
    type: Literal["cycle"] = "cycle"


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The end of a stream. The first choice's answer and trajectory; ``trajectories`` has those of all choices.

    usage: None unless the request asked for it with ``stream_options={"include_usage": True}``.
    rtap: None from a server that is not rtap's.
    """

    id: str
    text: str
    finish_reason: str
    rtap: Trajectory | None
    trajectories: tuple[Trajectory, ...]
    usage: CompletionUsage | None
    type: Literal["done"] = "done"


Event = ThinkingEvent | AnswerEvent | ToolCallEvent | CycleEvent | DoneEvent


@dataclass(slots=True)
class EventReader:
    """Reads one stream: ``read`` each chunk, then ``done``."""

    _id: str = ""
    _text: list[str] = field(default_factory=list[str])
    _finish_reason: str | None = None
    _rtap: Trajectory | None = None
    _trajectories: tuple[Trajectory, ...] = ()
    _usage: CompletionUsage | None = None

    def read(self, chunk: ChatCompletionChunk) -> Iterator[Event]:
        """The events of one chunk."""
        self._id = chunk.id or self._id
        self._usage = chunk.usage or self._usage
        self._read_trajectories(chunk)
        cycle = _cycle(chunk)
        for choice in chunk.choices:
            delta = choice.delta
            if choice.index == 0:
                self._finish_reason = choice.finish_reason or self._finish_reason
                self._text += [delta.content] if delta.content else []
            if cycle is not None:
                yield CycleEvent(cycle, choice.index)
            reasoning = cast(str | None, getattr(delta, "reasoning", None))
            if reasoning:
                yield ThinkingEvent(reasoning, choice.index)
            if delta.content:
                yield AnswerEvent(delta.content, choice.index)
            for call in delta.tool_calls or ():
                yield ToolCallEvent(call, choice.index)

    def done(self) -> DoneEvent:
        """The last event. Raises IncompleteStream if the first choice did not end."""
        if self._finish_reason is None:
            raise IncompleteStream("the stream ended before its answer did; ask again")
        return DoneEvent(
            self._id, "".join(self._text), self._finish_reason, self._rtap, self._trajectories, self._usage
        )

    def _read_trajectories(self, chunk: ChatCompletionChunk) -> None:
        found = trajectory(chunk)
        if found is not None:
            all_of_them: Any = getattr(chunk, "rtap_choices", None)
            self._rtap = found
            self._trajectories = tuple(_as_trajectory(t) for t in all_of_them) if all_of_them else (found,)


def _as_trajectory(value: Any) -> Trajectory:
    return value if isinstance(value, Trajectory) else Trajectory.construct(**value)


def _cycle(chunk: ChatCompletionChunk) -> Cycle | None:
    """The cycle that a chunk says has ended."""
    note: Any = getattr(chunk, "rtap", None)
    if isinstance(note, CycleNote):
        return note.cycle
    told = cast(dict[str, Any], note) if isinstance(note, dict) else {}
    return Cycle.construct(**told["cycle"]) if told.get("event") == "cycle" else None


@overload
def events(stream: Stream[Any]) -> Generator[Event]: ...


@overload
def events(stream: AsyncStream[Any]) -> AsyncGenerator[Event]: ...


def events(stream: Stream[Any] | AsyncStream[Any]) -> Generator[Event] | AsyncGenerator[Event]:
    """The events of ``client.chat.completions.create(…, stream=True)``; the last is a DoneEvent.

    When the iteration is left early the connection is closed, and the server stops writing.
    Raises IncompleteStream, and what the SDK raises when the server reports an error.
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
