"""Stop a thought whose answer no longer changes: ask for the answer while the thought is being written.

An Engine around an Engine, so the loop does not know. Every ``every`` tokens of a thought, what is there is closed and
an answer forced after it, on the cached prefix, beside the thought that goes on. Two probes in a row that agree, the
second of them scored above the threshold, end the thought: the cycle then is what was written so far, and that answer.
Off unless asked for.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rtap_core.errors import ConfidenceError
from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.stopping import normalise_answer
from rtap_core.types import Confidence, Engine, Judged, Step
from rtap_core.writing import injected, thought_is_open


@dataclass(frozen=True, slots=True)
class Probe:
    """An answer forced after part of a thought. num_tokens: with the tags before it. answer: None when it was not
    complete within its limit. confidence: None where nothing scored it."""

    steps: tuple[Step, ...]
    num_tokens: int
    answer: str | None
    confidence: float | None


@dataclass(slots=True)
class Probing:
    """``engine`` with probes. One instance serves one trajectory.

    question: token ids of the rendered prompt. request: handed to the scorer. every: tokens of a thought between
    probes. answer_tokens: an answer that is longer counts as none.
    num_probes, num_stopped: so far. discarded_tokens: sampled in probes that were not taken. confidence_tokens: read by
    the generator for probes.
    """

    engine: Engine
    format: TrajectoryFormat
    confidence: Confidence
    question: Sequence[int]
    request: Any
    every: int
    threshold: float
    answer_tokens: int
    num_probes: int = 0
    num_stopped: int = 0
    discarded_tokens: int = 0
    confidence_tokens: int = 0
    _forced_text: str = field(init=False)
    _is_off: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._forced_text = self.format.think_close + (self.format.answer_open or "")

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The engine's."""
        return self.engine.end_of_turn_ids

    def encode(self, text: str) -> list[int]:
        """The engine's."""
        return self.engine.encode(text)

    async def cycle(
        self,
        prompt_token_ids: Sequence[int],
        *,
        index: int,
        max_tokens: int | None,
        may_be_cut: bool,  # noqa: ARG002 - it always may
    ) -> AsyncGenerator[Step, None]:
        """The engine's cycle, which may end earlier than the model would have ended it."""
        prompt = list(prompt_token_ids)
        thought = _Thought(self.format, has_begun=index > 0 or thought_is_open(prompt, self, self.format))
        last: Probe | None = None
        task: asyncio.Task[Probe] | None = None
        next_at = self.every
        stream = self.engine.cycle(prompt, index=index, max_tokens=max_tokens, may_be_cut=True)
        try:
            async with aclosing(stream):
                async for step in stream:
                    yield step
                    thought.add(step)
                    if not thought.is_open:
                        continue
                    if task is not None and task.done():
                        probe, task = task.result(), None
                        if self._agree(last, probe) and _has_room(max_tokens, len(thought.token_ids), probe):
                            break
                        last = probe
                    if task is None and not self._is_off and len(thought.token_ids) >= next_at:
                        next_at = len(thought.token_ids) + self.every
                        task = asyncio.create_task(self._probe(prompt, index, thought.copy()))
                else:
                    return
            self.num_stopped += 1
            self.discarded_tokens -= sum(len(step.token_ids) for step in probe.steps)
            yield injected(self.encode(self._forced_text), self._forced_text)
            for step in probe.steps:
                yield step
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _agree(self, last: Probe | None, probe: Probe) -> bool:
        if last is None or last.answer is None or probe.answer is None or probe.confidence is None:
            return False
        same = normalise_answer(last.answer) == normalise_answer(probe.answer)
        return same and probe.confidence >= self.threshold

    async def _probe(self, prompt: list[int], index: int, thought: "_Thought") -> Probe:
        """The answer after ``thought`` as it is, and what the scorer thinks of it. Where the engine gives none, there
        is none; where the scorer fails, no further probe is made: the loop goes on without it as well."""
        self.num_probes += 1
        forced = self.encode(self._forced_text)
        parser = CycleParser(self.format, thought_open=True)
        thought.token_ids += forced
        steps: list[Step] = []
        stream = self.engine.cycle(
            [*prompt, *thought.token_ids], index=index, max_tokens=self.answer_tokens, may_be_cut=True
        )
        try:
            async with aclosing(stream):
                async for step in stream:
                    steps.append(step)
                    thought.add(step)
                    self.discarded_tokens += len(step.token_ids)
        except Exception:  # no room, or an answer that the engine gave up; what is wrong with it the thought meets too
            return Probe((), 0, None, None)
        for text in (self._forced_text, *(step.text for step in steps)):
            parser.feed(text)
        parser.close(ended_by_model=bool(steps) and steps[-1].ended_turn)
        num_tokens = len(forced) + sum(len(step.token_ids) for step in steps)
        if parser.answer is None:
            return Probe(tuple(steps), num_tokens, None, None)
        opening = self.encode(self.format.cycle_open)
        own = opening if index and prompt[-len(opening) :] == opening else []  # the cycle's own, in the prompt
        closing = self.encode(self.format.answer_close or "") if parser.owes_close else []
        written = [i for i in thought.token_ids if i not in self.end_of_turn_ids]
        context = prompt[: len(prompt) - len(own)]
        judged = Judged(self.question, [*own, *written, *closing], context, thought.logprobs, self.request)
        try:
            score = await self.confidence.score(judged)
        except ConfidenceError:
            self._is_off = True
            return Probe(tuple(steps), num_tokens, parser.answer, None)
        self.confidence_tokens += score.tokens
        return Probe(tuple(steps), num_tokens, parser.answer, score.confidence)


class _Thought:
    """What has been written of a cycle, and whether it is thinking still: begun, and not over."""

    def __init__(self, fmt: TrajectoryFormat, *, has_begun: bool) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[tuple[int, Mapping[int, Any]]] = []
        self._format, self._has_begun, self._is_over = fmt, has_begun, False
        self._tail = ""

    @property
    def is_open(self) -> bool:
        """Whether more of the thought may come."""
        return self._has_begun and not self._is_over

    def copy(self) -> "_Thought":
        """What is there now, to go on with otherwise."""
        other = _Thought(self._format, has_begun=self._has_begun)
        other.token_ids, other.logprobs = list(self.token_ids), list(self.logprobs)
        return other

    def add(self, step: Step) -> None:
        """The next piece; a tag may come in several."""
        self.token_ids.extend(step.token_ids)
        self.logprobs.extend(step.sampled_logprobs)
        if self._is_over:
            return
        fmt, text = self._format, self._tail + step.text
        ends = (fmt.think_close, fmt.answer_open or fmt.think_close)
        self._tail = text[-max(map(len, (fmt.think_open, *ends))) :]
        self._has_begun = self._has_begun or fmt.think_open in text
        self._is_over = step.finished or any(tag in text for tag in ends)


def _has_room(max_tokens: int | None, num_written: int, probe: Probe) -> bool:
    """Whether the answer of a probe fits into the budget of the cycle, its tags too."""
    return max_tokens is None or num_written + probe.num_tokens <= max_tokens
