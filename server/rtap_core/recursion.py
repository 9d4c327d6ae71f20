"""The Think–Answer loop: generate a cycle, score it, stop or continue on everything so far (R-TAP eq. 2).

``Recursion.run`` is an async generator of events over the Engine and Confidence protocols. The server turns the events
into vLLM outputs, training into rollouts. Cycles continue on token ids, never on re-tokenised text, so that an engine
with a prefix cache reads each token once. ``stopping.py`` and ``voting.py`` decide.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from rtap_core import stopping
from rtap_core.cutoff import Cutoff
from rtap_core.draft import Draft, StepEvent, num_thought_tokens, thought_is_open
from rtap_core.errors import ConfidenceError
from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import (
    Confidence,
    Continuation,
    Cycle,
    Engine,
    Judged,
    Limits,
    Policy,
    Score,
    Select,
    Step,
    StopReason,
    Trajectory,
)
from rtap_core.voting import candidates, next_wave


@dataclass(frozen=True, slots=True)
class CycleEvent:
    """A finished, scored cycle. ``stop``: reason that it is the last; None otherwise, and for samples of a vote."""

    cycle: Cycle
    stop: StopReason | None


@dataclass(frozen=True, slots=True)
class DraftEvent:
    """A step of a sample while it is written. It comes again as a StepEvent when the sample has finished."""

    step: StepEvent


@dataclass(frozen=True, slots=True)
class FinalEvent:
    """The finished trajectory; always the last event."""

    trajectory: Trajectory


Event = StepEvent | DraftEvent | CycleEvent | FinalEvent


@dataclass(slots=True)
class _State:
    """Progress of one trajectory.

    policy: as requested. limits: the request's, until the confidence generator fails.
    prompt: token ids of the question and all finished cycles. spent: used part of ``max_tokens``.
    """

    policy: Policy
    limits: Limits
    prompt: list[int]
    started: float
    cycles: list[Cycle] = field(default_factory=list[Cycle])
    spent: int = 0
    degraded: str | None = None
    is_fresh_fallback: bool = False
    first_answer_seconds: float | None = None

    def tokens_left(self, reserved: int) -> int | None:
        """Rest of the token budget after ``reserved`` further tokens, at least 0; None without a budget."""
        budget = self.limits.max_tokens
        return None if budget is None else max(0, budget - self.spent - reserved)

    def add_to_last(self, *, tokens: int, answer_tokens: int = 0) -> None:
        """Count further tokens in the last cycle."""
        last = self.cycles[-1]
        self.cycles[-1] = replace(last, tokens=last.tokens + tokens, answer_tokens=last.answer_tokens + answer_tokens)


@dataclass(frozen=True, slots=True)
class Recursion:
    """The loop over one engine and one scorer. Holds no state of a trajectory.

    confidence: None if no generator is loaded. count_oops: number of Oops tokens in a text.
    prefix: text of an assistant message that the request wants continued; the question ends with it.
    request: passed to the scorer in Judged. cutoff: shared with the engine. clock: monotonic seconds.
    drafts: report the steps of a vote's samples while they are written, as DraftEvents.
    falls_back: make fresh attempts after a continued cycle that is empty.
    """

    engine: Engine
    format: TrajectoryFormat
    confidence: Confidence | None
    count_oops: Callable[[str], int]
    prefix: str = ""
    request: Any = None
    cutoff: Cutoff = field(default_factory=Cutoff)
    clock: Callable[[], float] = time.monotonic
    drafts: bool = False
    falls_back: bool = True

    def run(self, question_token_ids: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        """Events of one trajectory. Close the generator to abort the cycle in progress."""
        return (self._vote if limits.policy is Policy.VOTE else self._recurse)(question_token_ids, limits)

    async def _recurse(self, question: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        """Cycles one after the other; each continues on all earlier ones, or starts on the question alone."""
        state = _State(limits.policy, limits, list(question), self.clock())
        draft = self._first_draft(question, limits)
        postponed: CycleEvent | None = None  # policy model: it may still end its turn, which makes that cycle the last
        while True:
            async with aclosing(self._write(draft, state)) as events:
                async for event in events:
                    if postponed is not None and draft.has_content:
                        yield postponed
                        postponed = None
                    yield event
            if postponed is not None and draft.is_blank:
                state.add_to_last(tokens=len(draft.token_ids))
                stop = StopReason.MODEL
                break
            if postponed is not None:
                yield postponed
                postponed = None
            state.cycles.append(await self._judge(draft, question, state))
            if state.degraded is not None:  # without confidences the model decides
                state.limits = replace(state.limits, policy=Policy.MODEL, select=Select.LAST)
            if state.limits.policy is Policy.MODEL:  # it continues its own text unchanged
                draft.closing = []
            self._continue_after(draft, state)
            if self.falls_back and draft.opening and not draft.has_content:  # a model that was not trained to continue
                state.limits, state.is_fresh_fallback = replace(state.limits, recursion=Continuation.FRESH), True
            stop = self._decide(draft, question, state)
            if stop is not None:
                break
            if _is_fresh(state.limits):
                draft.closing = []  # nothing follows it
            self._count_closing(draft, state)
            if state.limits.policy is Policy.MODEL:
                postponed = CycleEvent(state.cycles[-1], None)
            else:
                yield CycleEvent(state.cycles[-1], None)
                if draft.closing:
                    yield self._injected(
                        draft, draft.closing, draft.parser.closing_tag, in_answer=draft.parser.in_answer
                    )
            draft = self._next_draft(question, state)
        final = self._conclude(state, stopping.choose(state.cycles, state.limits.select), stop, draft)
        yield CycleEvent(final.trajectory.cycles[-1], stop)
        yield final

    async def _vote(self, question: Sequence[int], limits: Limits) -> AsyncGenerator[Event, None]:
        """Independent single cycles in waves, each wave generated concurrently, until the leading answer is certain."""
        state = _State(limits.policy, limits, list(question), self.clock())
        drafts, ranked = dict[int, Draft](), candidates([])
        while size := next_wave(ranked, limits.threshold, limits.samples - len(state.cycles)):
            async with aclosing(self._wave(question, state, drafts, size)) as events:
                async for event in events:
                    yield event
            # Samples finish in any order; sorted, the seed determines the outcome, ties included.
            state.cycles.sort(key=lambda c: c.index)
            ranked = candidates(state.cycles)
            if self.cutoff.reason is not None:
                break
        is_early = len(state.cycles) < limits.samples
        stop = self.cutoff.reason or (StopReason.AGREEMENT if is_early else StopReason.SAMPLES)
        if any(c.answer is not None and c.confidence is None for c in state.cycles):  # weights need all confidences
            state.cycles = [replace(c, confidence=None) for c in state.cycles]
        selected = ranked[0].first if ranked else None
        draft = drafts[max(drafts) if selected is None else selected]
        yield self._conclude(state, selected, stop, draft)

    async def _wave(
        self, question: Sequence[int], state: _State, drafts: dict[int, Draft], size: int
    ) -> AsyncGenerator[Event, None]:
        """The next ``size`` samples, added to ``state`` and ``drafts``. Their events come sample by sample, as samples
        finish."""

        queue = asyncio.Queue[DraftEvent | asyncio.Task[tuple[list[StepEvent], Cycle, Draft]]]()

        async def sample(index: int) -> tuple[list[StepEvent], Cycle, Draft]:
            draft, events = self._first_draft(question, state.limits, index), list[StepEvent]()
            async for event in self._write(draft, state):
                events.append(event)
                if self.drafts:
                    queue.put_nowait(DraftEvent(event))
            return events, await self._judge(draft, question, state), draft

        first, unfinished = len(state.cycles), size
        tasks = [asyncio.create_task(sample(index)) for index in range(first, first + size)]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, DraftEvent):
                    yield item
                    continue
                events, cycle, draft = await item
                unfinished -= 1
                for event in events:
                    yield event
                state.cycles.append(cycle)
                drafts[cycle.index] = draft
                yield CycleEvent(cycle, None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _first_draft(self, question: Sequence[int], limits: Limits, index: int = 0) -> Draft:
        """A cycle that begins the turn; the client or the chat template may have begun it. ``index``: of a sample."""
        opened = thought_is_open(question, self.engine, self.format)
        parser = self._parser(limits, thought_open=opened, prefix=self.prefix)
        return Draft(index, parser, question, [], "", self.clock(), limits.stop_token_ids)

    def _next_draft(self, question: Sequence[int], state: _State) -> Draft:
        """A further cycle of the trajectory."""
        if _is_fresh(state.limits):
            return self._first_draft(question, state.limits, len(state.cycles))
        opening = self._opening(state)
        text = self.format.cycle_open if opening else ""
        parser = self._parser(state.limits, thought_open=not opening, prefix=text)
        return Draft(len(state.cycles), parser, state.prompt, opening, text, self.clock(), state.limits.stop_token_ids)

    def _parser(self, limits: Limits, *, thought_open: bool, prefix: str = "") -> CycleParser:
        return CycleParser(
            self.format, thought_open=thought_open, prefix=prefix, stop=limits.stop, include_stop=limits.include_stop
        )

    def _opening(self, state: _State) -> list[int]:
        """Text that makes the model write one more cycle; nothing if the model decides by itself, or starts again."""
        if state.limits.policy is Policy.MODEL or _is_fresh(state.limits):
            return []
        return self.engine.encode(self.format.cycle_open)

    async def _write(self, draft: Draft, state: _State) -> AsyncGenerator[StepEvent, None]:
        """Generate one cycle: its injected opening, then every step of the engine."""
        left = state.tokens_left(len(draft.opening))
        if draft.opening:  # as an event, so that it is streamed and counted like any other token
            yield self._injected(draft, draft.opening, draft.opening_text, in_answer=False)
        async with aclosing(self.engine.cycle(draft.prompt, index=draft.index, max_tokens=left)) as steps:
            async for step in steps:
                yield draft.add(step)
                if draft.is_stopped:
                    break
        draft.seconds = self.clock() - draft.started
        if draft.parser.closing_tag:
            draft.closing = self.engine.encode(draft.parser.closing_tag)

    def _injected(self, draft: Draft, token_ids: list[int], text: str, *, in_answer: bool) -> StepEvent:
        return StepEvent(draft.index, Step.injected(token_ids, text), "", in_answer)

    async def _judge(self, draft: Draft, question: Sequence[int], state: _State) -> Cycle:
        """The finished cycle, scored if a decision needs it and its answer is complete. Records a failed generator."""
        score = seconds = None
        scorer = self.confidence if stopping.needs_score(state.limits) else None
        if scorer is not None and draft.parser.answer is not None:
            began = self.clock()
            try:
                score = await self._score(scorer, draft, question)
            except ConfidenceError as error:
                state.degraded = error.reason if state.degraded is None else state.degraded
            seconds = self.clock() - began
        draft.logprobs = []  # an object for each token, and a vote keeps its drafts
        if state.first_answer_seconds is None and draft.parser.answer is not None:
            state.first_answer_seconds = self.clock() - state.started
        first = draft.first
        return Cycle(
            index=draft.index,
            think=draft.parser.think.strip(),
            answer=draft.parser.answer,
            confidence=None if score is None else score.confidence,
            accepted=False,
            tokens=len(draft.token_ids),
            answer_tokens=self._answer_tokens(draft),
            oops_tokens=self.count_oops(draft.parser.think),
            prompt_tokens=first.prompt_tokens if first else 0,
            cached_tokens=first.cached_tokens if first else 0,
            seconds=draft.seconds + (seconds or 0.0),
            confidence_seconds=seconds,
            confidence_tokens=0 if score is None else score.tokens,
            stop=None if draft.last is None else draft.last.stop_reason,
            logprobs=None if score is None else score.logprobs,
        )

    async def _score(self, scorer: Confidence, draft: Draft, question: Sequence[int]) -> Score | None:
        """The cycle's score; None if the cutoff comes first, which is no fault of the generator."""
        cycle = draft.complete_ids(self.engine.end_of_turn_ids)
        judged = Judged(question, cycle, draft.context, draft.logprobs, self.request, draft.parser.answer)
        try:
            async with asyncio.timeout(None) as timeout:
                with self.cutoff.on_cut(lambda: timeout.reschedule(0)):
                    return await scorer.score(judged)
        except TimeoutError:
            return None

    def _continue_after(self, draft: Draft, state: _State) -> None:
        """Make the cycle part of the prompt and of the spent budget."""
        state.prompt = state.prompt + draft.complete_ids(self.engine.end_of_turn_ids)
        state.spent += len(draft.token_ids) + len(draft.closing)

    def _decide(self, draft: Draft, question: Sequence[int], state: _State) -> StopReason | None:
        return stopping.decide(
            state.cycles,
            state.limits,
            ended_turn=draft.ended_turn,
            ended_text=draft.ended_text,
            truncated=draft.truncated,
            no_room=state.tokens_left(len(self._opening(state))) == 0 or self._has_thought_enough(question, state),
            cut=self.cutoff.reason,
        )

    def _has_thought_enough(self, question: Sequence[int], state: _State) -> bool:
        """True when the thoughts so far have used up their budget."""
        budget = state.limits.thinking_tokens
        if budget is None:
            return False
        return num_thought_tokens(question, state.prompt, self.engine, self.format) >= budget

    def _count_closing(self, draft: Draft, state: _State) -> None:
        """Count the injected closing tag, which only a further cycle needs."""
        num_tokens = len(draft.closing)
        state.add_to_last(tokens=num_tokens, answer_tokens=num_tokens if draft.parser.answer else 0)

    def _answer_tokens(self, draft: Draft) -> int:
        """Tokens of a complete answer with its tags (format ``think``: all after the thought, ``text``: all)."""
        if draft.parser.answer is None:
            return 0
        ids = draft.token_ids
        if not self.format.has_think_tags:
            return len(ids) - len(draft.opening)
        before = self.engine.encode(self.format.answer_open or self.format.think_close)
        if len(before) == 1 and before[0] in ids:
            start = len(ids) - 1 - ids[::-1].index(before[0])
            return len(ids) - start - (0 if self.format.has_answer_tags else 1)
        return len(self.engine.encode(draft.parser.answer))

    def _conclude(self, state: _State, selected: int | None, stop: StopReason, draft: Draft) -> FinalEvent:
        """The finished trajectory. ``draft``: the cycle whose end the response reports."""
        trajectory = Trajectory(
            policy=state.policy,
            stop_reason=stop,
            cycles=tuple(replace(c, accepted=i == selected) for i, c in enumerate(state.cycles)),
            selected=selected,
            degraded=state.degraded,
            first_answer_seconds=state.first_answer_seconds,
            seconds=self.clock() - state.started,
            finish=draft.last,
            partial_answer=draft.parser.partial_answer if selected is None else None,
            is_fresh_fallback=state.is_fresh_fallback,
        )
        return FinalEvent(trajectory)


def _is_fresh(limits: Limits) -> bool:
    """True if the next cycle starts on the question alone."""
    return limits.recursion is Continuation.FRESH and limits.policy is not Policy.MODEL
