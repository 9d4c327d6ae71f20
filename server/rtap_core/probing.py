"""In-thought probing: end a thought early once its answer no longer changes. Off by default.

``Probing`` is an Engine around an Engine, invisible to the loop. Every ``every`` tokens of a thought it forks the
thought on the cached prefix, closes it and samples an answer, while the thought goes on. Two probes in a row with the
same answer, the second scored at or above the threshold, end the thought: the cycle becomes the thought so far plus
that answer.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rtap_core.answers import same_answer
from rtap_core.draft import thought_is_open
from rtap_core.errors import ConfidenceError
from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import Confidence, Engine, Judged, Step


@dataclass(frozen=True, slots=True)
class Probe:
    """Answer sampled after part of a thought.

    num_tokens: of the answer and the forced tags before it. answer: None if incomplete within its token limit.
    confidence: None if it was not scored."""

    steps: tuple[Step, ...]
    num_tokens: int
    answer: str | None
    confidence: float | None


@dataclass(slots=True)
class Probing:
    """``engine`` with probes. One instance serves one trajectory. The engine must yield a step per few tokens.

    question: token ids of the rendered prompt. request: passed to the scorer in Judged.
    every: tokens of a thought between probes. answer_tokens: limit of a probe; a longer answer counts as none.
    num_probes, num_stopped: probes, and thoughts that they ended. discarded_tokens: sampled in unused probes.
    confidence_tokens: tokens that the generator read for probes.
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
        """As the wrapped engine's."""
        return self.engine.end_of_turn_ids

    def encode(self, text: str) -> list[int]:
        """As the wrapped engine's."""
        return self.engine.encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        """The wrapped engine's cycle, which a probe may end early."""
        prompt = list(prompt_token_ids)
        is_open = self._is_continued(prompt, index) or thought_is_open(prompt, self, self.format)
        thought = _Thought(self.format, has_begun=is_open)
        last: Probe | None = None
        task: asyncio.Task[Probe] | None = None
        next_at = self.every
        stream = self.engine.cycle(prompt, index=index, max_tokens=max_tokens)
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
            yield Step.injected(self.encode(self._forced_text), self._forced_text)
            for step in probe.steps:
                yield step
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _is_continued(self, prompt: Sequence[int], index: int) -> bool:
        """True if the loop has opened the cycle, at the end of the prompt."""
        opening = self.encode(self.format.cycle_open)
        return index > 0 and list(prompt[-len(opening) :]) == opening

    def _agree(self, last: Probe | None, probe: Probe) -> bool:
        if last is None or last.answer is None or probe.answer is None or probe.confidence is None:
            return False
        return same_answer(last.answer, probe.answer) and probe.confidence >= self.threshold

    async def _probe(self, prompt: list[int], index: int, thought: "_Thought") -> Probe:
        """Sample and score an answer after ``thought``.

        A failing engine makes a probe without answer; a failing scorer ends probing, as it degrades the request."""
        self.num_probes += 1
        forced = self.encode(self._forced_text)
        parser = CycleParser(self.format, thought_open=True)
        thought.token_ids += forced
        steps: list[Step] = []
        stream = self.engine.cycle([*prompt, *thought.token_ids], index=index, max_tokens=self.answer_tokens)
        try:
            async with aclosing(stream):
                async for step in stream:
                    steps.append(step)
                    thought.add(step)
                    self.discarded_tokens += len(step.token_ids)
        except Exception:  # no room in the context, or aborted; an engine that is broken fails the thought too
            return Probe((), 0, None, None)
        for text in (self._forced_text, *(step.text for step in steps)):
            parser.feed(text)
        parser.close(ended_by_model=bool(steps) and steps[-1].ended_turn)
        num_tokens = len(forced) + sum(len(step.token_ids) for step in steps)
        if parser.answer is None:
            return Probe(tuple(steps), num_tokens, None, None)
        injected = self.encode(self.format.cycle_open) if self._is_continued(prompt, index) else []
        closing = self.encode(parser.closing_tag)
        written = [i for i in thought.token_ids if i not in self.end_of_turn_ids]
        context = prompt[: len(prompt) - len(injected)]
        cycle, logprobs = [*injected, *written, *closing], thought.logprobs
        judged = Judged(self.question, cycle, context, logprobs, self.request, parser.answer)
        try:
            score = await self.confidence.score(judged)
        except ConfidenceError:
            self._is_off = True
            return Probe(tuple(steps), num_tokens, parser.answer, None)
        self.confidence_tokens += score.tokens
        return Probe(tuple(steps), num_tokens, parser.answer, score.confidence)


class _Thought:
    """Token ids of a cycle so far, and the state of its thought: not begun, open, over."""

    def __init__(self, fmt: TrajectoryFormat, *, has_begun: bool) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[tuple[int, Mapping[int, Any]]] = []
        self._format, self._has_begun, self._is_over = fmt, has_begun, False
        self._tail = ""

    @property
    def is_open(self) -> bool:
        """True between the beginning and the end of the thought."""
        return self._has_begun and not self._is_over

    def copy(self) -> "_Thought":
        """The same tokens, to continue differently."""
        other = _Thought(self._format, has_begun=self._has_begun)
        other.token_ids, other.logprobs = list(self.token_ids), list(self.logprobs)
        return other

    def add(self, step: Step) -> None:
        """Append the next step. A tag may span several."""
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
    """True if the probe's answer and tags fit into the cycle's token budget."""
    return max_tokens is None or num_written + probe.num_tokens <= max_tokens
