"""One cycle while it is being written, which may begin before the verdict on the cycle before it is known."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import Engine, Step


class StepEvent(NamedTuple):
    """A piece of a cycle as it is written. ``think``: its thinking text, tags removed; empty inside an answer."""

    cycle_index: int
    step: Step
    think: str
    in_answer: bool


@dataclass(slots=True)
class Draft:
    """What there is of a cycle. opening: token ids that the loop wrote to begin it, ``opening_text`` in text.
    seconds: it was written in, once that has ended. token_ids: all of them, the opening included. first, last: of its
    steps; those between are not kept, because an engine's objects would fill the memory in a long thought."""

    index: int
    parser: CycleParser
    opening: list[int]
    opening_text: str
    started: float
    seconds: float = 0.0
    token_ids: list[int] = field(init=False)
    logprobs: list[tuple[int, Mapping[int, Any]]] = field(init=False)
    first: Step | None = None
    last: Step | None = None

    def __post_init__(self) -> None:
        self.token_ids, self.logprobs = list(self.opening), []

    def add(self, step: Step) -> StepEvent:
        """Take the engine's next piece."""
        think = self.parser.feed(step.text)
        if step.finished:
            think += self.parser.close(ended_by_model=step.ended_turn)
        self.token_ids.extend(step.token_ids)
        if step.logprobs is not None:
            self.logprobs.extend(step.sampled_logprobs)
        self.first, self.last = self.first or step, step
        return StepEvent(self.index, step, think, self.parser.in_answer)

    @property
    def truncated(self) -> bool:
        """The token limit cut it."""
        return self.last is not None and self.last.truncated

    @property
    def ended_turn(self) -> bool:
        """The model ended its turn in it."""
        return self.last is not None and self.last.ended_turn

    @property
    def has_content(self) -> bool:
        """Something other than white space and tags has been written."""
        return bool(self.parser.think.strip() or self.parser.partial_answer)

    @property
    def is_blank(self) -> bool:
        """The model ended its turn instead of writing anything."""
        return self.ended_turn and not self.has_content


class Writing:
    """The events of a draft, written as they are read, or already before that once ``start`` was called."""

    def __init__(self, draft: Draft, steps: AsyncGenerator[StepEvent, None]) -> None:
        self.draft = draft
        self._steps = steps
        self._task: asyncio.Task[None] | None = None
        self._queue: asyncio.Queue[StepEvent | Exception | None] = asyncio.Queue()

    def start(self) -> None:
        """Write without waiting for a reader."""
        self._task = asyncio.create_task(self._write_ahead())

    async def _write_ahead(self) -> None:
        try:
            async with aclosing(self._steps) as steps:
                async for event in steps:
                    self._queue.put_nowait(event)
            self._queue.put_nowait(None)
        except Exception as error:  # the reader's, if there will be one
            self._queue.put_nowait(error)

    def events(self) -> AsyncGenerator[StepEvent, None]:
        """The opening and every step. Raises what the engine raised."""
        return self._steps if self._task is None else self._written_ahead()

    async def _written_ahead(self) -> AsyncGenerator[StepEvent, None]:
        while (event := await self._queue.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    async def close(self) -> int:
        """Abort what is still being written. Result: tokens that the engine had sampled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None  # it keeps its error, that its frames, and these this object
        await self._steps.aclose()
        return len(self.draft.token_ids) - len(self.draft.opening)


async def write(
    stream: AsyncGenerator[Step, None], draft: Draft, *, clock: Callable[[], float]
) -> AsyncGenerator[StepEvent, None]:
    """The opening and the engine's steps as those of ``draft``, until their end."""
    if draft.opening:  # as an event, so that it is streamed and counted like any other token
        yield StepEvent(draft.index, injected(draft.opening, draft.opening_text), "", False)
    async with aclosing(stream):
        async for step in stream:
            yield draft.add(step)
    draft.seconds = clock() - draft.started


def thought_is_open(prompt: Sequence[int], engine: Engine, fmt: TrajectoryFormat) -> bool:
    """Whether ``prompt`` ends by beginning a thought; a template may write a newline after the tag."""
    opening, closing = engine.encode(fmt.think_open), engine.encode(fmt.think_close)
    tail = list(prompt[-len(opening) - 1 :])
    return opening in (tail[1:], tail[:-1]) and tail[-1:] != closing[-1:]


def injected(token_ids: list[int], text: str) -> Step:
    """A tag that the loop writes, not the model."""
    return Step(text, token_ids, False, False, False, 0, 0, native=None)
