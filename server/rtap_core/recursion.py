"""The Think–Answer loop: write a cycle, judge it, stop or write another that sees all earlier ones (R-TAP eq. 2).

One async generator of events over the Engine and Confidence protocols; the server turns the events into vLLM outputs
and training into rollouts. Cycles continue on token ids, never on re-tokenised text, so an engine with a prefix cache
reads each token once. Decisions live in ``stopping.py``; nothing here counts metrics or knows HTTP.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rtap_core import stopping
from rtap_core.cutoff import Cutoff
from rtap_core.errors import ConfidenceError
from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import (
    Confidence,
    Cycle,
    Engine,
    Judged,
    Limits,
    Policy,
    Score,
    Select,
    StopReason,
    Trajectory,
)
from rtap_core.writing import Draft, StepEvent, Writing, injected, thought_is_open, write


@dataclass(frozen=True, slots=True)
class CycleEvent:
    """A cycle is complete and judged. ``stop``: why it is the last; None when another may follow, and in a vote."""

    cycle: Cycle
    stop: StopReason | None


@dataclass(frozen=True, slots=True)
class FinalEvent:
    """The trajectory is finished; always the last event."""

    trajectory: Trajectory


Event = StepEvent | CycleEvent | FinalEvent


@dataclass(frozen=True, slots=True)
class Recursion:
    """The loop and what it works with. One instance serves one request, or all where
    the scorer needs nothing of it.

    confidence: None when no generator is loaded. count_oops: Oops tokens in a text. prefix: text at the end of the
    question that is already the beginning of the turn. request: handed to the scorer as it is. is_idle: whether the
    engine has room for a cycle that may not be wanted. cutoff: when it must end; the engine knows it as well.
    clock: monotonic seconds.
    """

    engine: Engine
    format: TrajectoryFormat
    confidence: Confidence | None
    count_oops: Callable[[str], int]
    prefix: str = ""
    request: Any = None
    is_idle: Callable[[], bool] = lambda: False
    cutoff: Cutoff = field(default_factory=Cutoff)
    clock: Callable[[], float] = time.monotonic

    def run(self, question_token_ids: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        """Events of one trajectory. Close the generator to abort the cycle being written."""
        return (self._vote if limits.policy is Policy.VOTE else self._recurse)(question_token_ids, limits)

    async def _recurse(self, question: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        requested, started = limits.policy, self.clock()
        prompt, cycles, spent, discarded = list(question), list[Cycle](), 0, 0
        degraded, held = None, None  # held: a cycle's event while the model may still end its turn there
        writing, ahead = self._first(question, limits), None
        try:
            while True:
                draft = writing.draft
                async with aclosing(writing.events()) as events:
                    async for event in events:
                        if held is not None and draft.has_content:
                            yield held  # the model goes on, so the answer before was not its last
                            held = None
                        yield event
                if held is not None and draft.is_blank:
                    cycles[-1] = replace(cycles[-1], tokens=cycles[-1].tokens + len(draft.token_ids))
                    stop = StopReason.MODEL
                    break
                if held is not None:
                    yield held
                    held = None
                closing = self._closing(draft)
                context, prompt = prompt, prompt + _without_end(draft.token_ids, self.engine.end_of_turn_ids) + closing
                spent += len(draft.token_ids) + len(closing)
                cycle = self._finish(draft)
                if self._may_write_ahead([*cycles, cycle], draft, limits, spent):
                    ahead = self._next(len(cycles) + 1, prompt, limits, spent, may_be_cut=True)
                    ahead.start()
                score, seconds, failure = await self._judge(draft, closing, question, context, limits)
                if failure is not None:
                    degraded, limits = failure, replace(limits, policy=Policy.MODEL, select=Select.LAST)
                cycles.append(self._scored(cycle, score, seconds))
                stop = self._decide(cycles, draft, limits, spent)
                if ahead is not None and (stop is not None or failure is not None):
                    discarded += await ahead.close()
                    ahead = None
                if stop is not None:
                    break
                if closing:
                    last = cycles[-1]
                    tokens, answer_tokens = last.tokens + len(closing), last.answer_tokens + len(closing)
                    cycles[-1] = replace(last, tokens=tokens, answer_tokens=answer_tokens if last.answer else 0)
                if limits.policy is Policy.MODEL:
                    held = CycleEvent(cycles[-1], None)
                else:
                    yield CycleEvent(cycles[-1], None)
                    if closing:
                        yield StepEvent(draft.index, injected(closing, self.format.answer_close or ""), "", True)
                writing, ahead = ahead or self._next(len(cycles), prompt, limits, spent), None
            selected = stopping.choose(cycles, limits.select)
            final = self._conclude(cycles, selected, stop, degraded, draft, requested, started, discarded)
            yield CycleEvent(final.trajectory.cycles[-1], stop)
            yield final
        finally:
            try:
                await writing.close()
            finally:  # a task that is being cancelled may be so again at every await
                if ahead is not None:
                    await ahead.close()

    async def _vote(self, question: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        """Independent single cycles written side by side; events arrive sample by sample, as samples finish."""
        started = self.clock()
        failures: list[str] = []

        async def sample(index: int) -> tuple[list[StepEvent], Cycle, Draft]:
            writing = self._first(question, limits, index=index)
            draft = writing.draft
            events = [e async for e in writing.events()]
            closing = self._closing(draft)
            score, seconds, failure = await self._judge(draft, closing, question, question, limits)
            if failure is not None:
                failures.append(failure)
            return events, self._scored(self._finish(draft), score, seconds), draft

        tasks = [asyncio.create_task(sample(i)) for i in range(limits.samples)]
        cycles, drafts = list[Cycle](), list[Draft]()
        try:
            for done in asyncio.as_completed(tasks):
                events, cycle, draft = await done
                for event in events:
                    yield event
                cycles.append(cycle)
                drafts.append(draft)
                yield CycleEvent(cycle, None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # They ended in any order; by index, a seed fixes the outcome, ties included.
        cycles.sort(key=lambda c: c.index)
        drafts.sort(key=lambda d: d.index)
        if any(c.answer is not None and c.confidence is None for c in cycles):  # then each counts as one
            cycles = [replace(c, confidence=None) for c in cycles]
        selected = stopping.majority(cycles)
        stop = self.cutoff.reason or StopReason.VOTE
        draft = drafts[-1 if selected is None else selected]
        degraded = failures[0] if failures else None
        yield self._conclude(cycles, selected, stop, degraded, draft, limits.policy, started)

    def _parser(self, question: Sequence[int]) -> CycleParser:
        """A parser for a first cycle, which begins where the client or the chat template began it."""
        opened = thought_is_open(question, self.engine, self.format)
        return CycleParser(self.format, thought_open=opened, prefix=self.prefix)

    def _opening(self, limits: Limits) -> list[int]:
        """What makes the model write one more cycle; nothing where the model itself decides."""
        return [] if limits.policy is Policy.MODEL else self.engine.encode(self.format.cycle_open)

    def _closing(self, draft: Draft) -> list[int]:
        """The end tag that a grammar did not let the model write: scorers and further cycles read whole cycles."""
        return self.engine.encode(self.format.answer_close or "") if draft.parser.owes_close else []

    def _first(self, question: Sequence[int], limits: Limits, *, index: int = 0) -> Writing:
        """A cycle that begins the turn; ``index`` numbers the samples of a vote."""
        draft = Draft(index, self._parser(question), [], "", self.clock())
        return self._writing(draft, question, limits, 0)

    def _next(self, index: int, prompt: list[int], limits: Limits, spent: int, *, may_be_cut: bool = False) -> Writing:
        """A further cycle, after ``spent`` tokens of the budget."""
        opening = self._opening(limits)
        parser = CycleParser(self.format, thought_open=True)
        draft = Draft(index, parser, opening, self.format.cycle_open if opening else "", self.clock())
        return self._writing(draft, prompt + opening, limits, spent, may_be_cut=may_be_cut)

    def _writing(
        self, draft: Draft, prompt: Sequence[int], limits: Limits, spent: int, *, may_be_cut: bool = False
    ) -> Writing:
        left = _left(limits, spent + len(draft.opening))
        stream = self.engine.cycle(prompt, index=draft.index, max_tokens=left, may_be_cut=may_be_cut)
        return Writing(draft, write(stream, draft, clock=self.clock))

    def _decide(self, cycles: Sequence[Cycle], draft: Draft, limits: Limits, spent: int) -> StopReason | None:
        return stopping.decide(
            cycles,
            limits,
            ended_turn=draft.ended_turn,
            truncated=draft.truncated,
            no_room=_left(limits, spent + len(self._opening(limits))) == 0,
            cut=self.cutoff.reason,
        )

    def _may_write_ahead(self, cycles: Sequence[Cycle], draft: Draft, limits: Limits, spent: int) -> bool:
        """Whether the next cycle can begin while the last of ``cycles`` is being scored: there is a score to wait for,
        the lowest would make the loop go on, and the engine has room."""
        waits = limits.policy is Policy.CONFIDENCE and limits.threshold > 0 and cycles[-1].answer is not None
        waits = waits and self.confidence is not None
        return waits and self._decide(cycles, draft, limits, spent) is None and self.is_idle()

    async def _judge(
        self,
        draft: Draft,
        closing: list[int],
        question: Sequence[int],
        context: Sequence[int],
        limits: Limits,
    ) -> tuple[Score | None, float | None, str | None]:
        """(score, seconds waited, why it failed). Nothing is scored that no decision needs, nor a cut cycle."""
        if self.confidence is None or not stopping.needs_score(limits) or draft.parser.answer is None:
            return None, None, None
        began = self.clock()
        cycle = _without_end(draft.token_ids, self.engine.end_of_turn_ids) + closing
        judged = Judged(question, cycle, context, draft.logprobs, self.request)
        try:
            async with asyncio.timeout(None) as wait:
                with self.cutoff.calling(lambda: wait.reschedule(0)):
                    score = await self.confidence.score(judged)
        except TimeoutError:  # the cutoff's, not a fault of the generator
            return None, self.clock() - began, None
        except ConfidenceError as error:
            return None, self.clock() - began, error.reason
        return score, self.clock() - began, None

    def _finish(self, draft: Draft) -> Cycle:
        """The cycle as it was written, not yet scored."""
        first = draft.first
        return Cycle(
            index=draft.index,
            think=draft.parser.think.strip(),
            answer=draft.parser.answer,
            confidence=None,
            accepted=False,
            tokens=len(draft.token_ids),
            answer_tokens=self._answer_tokens(draft),
            oops_tokens=self.count_oops(draft.parser.think),
            prompt_tokens=first.prompt_tokens if first else 0,
            cached_tokens=first.cached_tokens if first else 0,
            seconds=draft.seconds,
            confidence_seconds=None,
            confidence_tokens=0,
        )

    def _scored(self, cycle: Cycle, score: Score | None, confidence_seconds: float | None) -> Cycle:
        return replace(
            cycle,
            confidence=None if score is None else score.confidence,
            seconds=cycle.seconds + (confidence_seconds or 0.0),
            confidence_seconds=confidence_seconds,
            confidence_tokens=0 if score is None else score.tokens,
        )

    def _answer_tokens(self, draft: Draft) -> int:
        """Tokens of a complete answer with its tags (``think`` preset: all after the thought)."""
        if draft.parser.answer is None:
            return 0
        ids = draft.token_ids
        before = self.engine.encode(self.format.answer_open or self.format.think_close)
        if len(before) == 1 and before[0] in ids:
            start = len(ids) - 1 - ids[::-1].index(before[0])
            return len(ids) - start - (0 if self.format.has_answer_tags else 1)
        return len(self.engine.encode(draft.parser.answer))

    def _conclude(
        self,
        cycles: Sequence[Cycle],
        selected: int | None,
        stop: StopReason,
        degraded: str | None,
        draft: Draft,
        policy: Policy,
        started: float,
        discarded: int = 0,
    ) -> FinalEvent:
        """The finished trajectory, its returned cycle marked."""
        marked = tuple(replace(c, accepted=i == selected) for i, c in enumerate(cycles))
        now = self.clock() - started
        trajectory = Trajectory(
            policy=policy,
            stop_reason=stop,
            cycles=marked,
            selected=selected,
            degraded=degraded,
            first_answer_seconds=None if selected is None else now,
            seconds=now,
            finish=draft.last,
            partial_answer=draft.parser.partial_answer if selected is None else None,
            discarded_tokens=discarded,
        )
        return FinalEvent(trajectory)


def _left(limits: Limits, spent: int) -> int | None:
    """Tokens left of the budget, never negative; None without a budget."""
    return None if limits.max_tokens is None else max(0, limits.max_tokens - spent)


def _without_end(token_ids: list[int], end_of_turn_ids: frozenset[int]) -> list[int]:
    """Token ids of a cycle as the next one may see them: a model that reads its own end of turn stops at once."""
    end = len(token_ids)
    while end and token_ids[end - 1] in end_of_turn_ids:
        end -= 1
    return token_ids[:end]
