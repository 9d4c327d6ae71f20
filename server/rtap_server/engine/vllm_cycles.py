"""Cycles on vLLM: each an ordinary ``AsyncLLM.generate`` on the token ids so far, or all of them from one request."""

import asyncio
import copy
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence, Set
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vllm.engine.protocol import EngineClient
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from rtap_core import stopping
from rtap_core.cutoff import Cutoff
from rtap_core.draft import num_thought_tokens, thought_is_closed
from rtap_core.types import Continuation, Limits, Policy, Step, StopReason
from rtap_server.engine.output_writer import GenerateCall, part_of
from rtap_server.engine.request_state import RequestState
from rtap_server.engine.server_state import ServerState
from rtap_server.engine.vllm_compat import set_stops

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import CycleSpans

# Seeds of cycles are a prime apart, so that they never equal those of other choices (seed + index, as in vLLM).
_SEED_STRIDE = 1_000_003
_SEED_RANGE = 2**63
_ABORT_RETRY_SECONDS = 0.05


class CycleAborted(Exception):
    """The engine ended a cycle with ``abort``, ``error`` or ``repetition``; so does the request."""

    def __init__(self, finish_reason: str) -> None:
        super().__init__(finish_reason)
        self.finish_reason = finish_reason


class VllmCycles:
    """The Engine protocol of ``rtap_core`` on an AsyncLLM, for one choice of one request."""

    def __init__(
        self,
        inner: EngineClient,
        server: ServerState,
        call: GenerateCall,
        choice: int,
        engine_id: Callable[[str], str],
        running: set[str],
        cutoff: Cutoff,
        spans: "CycleSpans | None" = None,
        *,
        stops_at_cycle_end: bool = True,
        in_pieces: bool = False,
    ) -> None:
        """engine_id: makes a unique id of the route's. running: engine ids in flight, kept up to date here.

        in_pieces: yield steps as they are sampled, even if the request wants one output. Stops of answers need it."""
        self._inner, self._server, self._call, self._choice = inner, server, call, choice
        self._engine_id, self._running, self._cutoff, self._spans = engine_id, running, cutoff, spans
        self._aborts: set[asyncio.Task[None]] = set()
        self._in_pieces = in_pieces or not stops_at_cycle_end or call.limits.stops_answers
        self._end_ids = server.cycle_end_ids if stops_at_cycle_end else []
        self._end_text = server.format.answer_close if stops_at_cycle_end else None
        self._text_stops: Set[str | int] = frozenset()
        if not call.parses_reasoning:
            stops = _as_list(call.params.stop)
            self._text_stops = frozenset((*stops, *(call.params.stop_token_ids or ())))
            if stops and server.shows_cycle_end:  # as text, because vLLM searches no stop token for stop strings
                self._end_ids = []
        self.end_of_turn_ids = server.end_of_turn_ids

    def encode(self, text: str) -> list[int]:
        return self._server.encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        call = self._call
        is_first = len(prompt_token_ids) == len(call.prompt["prompt_token_ids"])
        prompt = call.prompt if is_first else call.prompt_with(prompt_token_ids)
        engine_id = self._engine_id(call.request_id)
        params = self._params(index, max_tokens, prompt_token_ids, is_continued=not is_first)
        self._running.add(engine_id)
        try:
            options: dict[str, Any] = call.options
            if call.parses_reasoning:
                options = {**options, "reasoning_ended": self._starts_with_answer(prompt_token_ids)}
            if self._spans is not None:
                options = {**options, "trace_headers": self._spans.headers(index)}
            outputs = self._inner.generate(cast(Any, prompt), params, engine_id, **options)
            if call.state.owner:  # only API keys have token limits
                outputs = count_spent(outputs, call.state, params.output_kind)
            with self._cutoff.on_cut(lambda: self._abort(engine_id)):
                async with aclosing(outputs):
                    async for output in outputs:
                        part = output.outputs[0]
                        step = self._step(output, part) if part.finish_reason is None else self._last(output, part)
                        if call.limits.stops_answers and len(step.token_ids) > 1:
                            for piece in self._token_by_token(step):
                                yield piece
                        else:
                            yield step
        finally:
            self._running.discard(engine_id)

    def _starts_with_answer(self, prompt: Sequence[int]) -> bool:
        """True if a grammar applies from the first token."""
        server = self._server
        ends_with_thought = not server.format.has_answer_tags and thought_is_closed(prompt, self, server.format)
        return ends_with_thought or not server.marks_answers

    def _step(self, output: RequestOutput, part: CompletionOutput) -> Step:
        read, cached = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
        return Step(part.text, part.token_ids, False, False, False, read, cached, output, cast(Any, part.logprobs))

    def _last(self, output: RequestOutput, part: CompletionOutput) -> Step:
        """The last step of a cycle, with the reason for its end. Raises CycleAborted."""
        reason = part.finish_reason
        if reason is not None and reason not in ("stop", "length") and not self._is_cut(reason):
            raise CycleAborted(reason)
        end_ids, end_text = self._end_ids, self._end_text
        ended_text = part.stop_reason in self._text_stops
        at_end_tag = part.stop_reason in end_ids or (not end_ids and part.stop_reason == end_text is not None)
        cycle_ended = at_end_tag and not ended_text
        is_hidden = cycle_ended and not self._call.params.include_stop_str_in_output
        return self._step(output, part)._replace(
            text=part.text + (end_text or "") if is_hidden else part.text,
            finished=True,
            truncated=reason == "length",
            ended_turn=reason == "stop" and not cycle_ended,
            ended_text=ended_text,
            stop_reason=None if cycle_ended else part.stop_reason,
        )

    def _token_by_token(self, step: Step) -> Iterator[Step]:
        """``step`` in steps of one token, so that a stop ends the answer at its own token.

        A step has several tokens when its reader was slow."""
        ids, begin = list(step.token_ids), 0
        shown = ids[:-1] if step.ended_turn else ids  # the end of turn has no text
        for at in range(1, len(ids) + 1):
            rest = self._server.decode(shown[at:], self._call.params.skip_special_tokens) if at < len(ids) else ""
            end, tokens, is_last = max(begin, len(step.text) - len(rest)), slice(at - 1, at), at == len(ids)
            text, begin = step.text[begin:end], end
            piece = _piece(step, text, tokens, part_of(step.native, text, tokens, is_last=is_last))
            if not is_last:
                piece = piece._replace(finished=False, truncated=False, ended_turn=False, stop_reason=None)
            yield piece

    def _is_cut(self, finish_reason: str) -> bool:
        """True when the engine aborted the cycle because the trajectory must end.

        Ctrl-C signals the whole process group, so engines may abort before the drain cuts the trajectory."""
        if finish_reason == "abort" and self._server.drain.has_begun:
            self._cutoff.cut(StopReason.DRAINED)
        return finish_reason == "abort" and self._cutoff.reason is not None

    def _abort(self, engine_id: str) -> None:
        """Make the engine end a cycle with the tokens it has."""

        async def until_gone() -> None:
            while engine_id in self._running:  # the engine ignores the abort of a request that has not arrived yet
                with suppress(EngineDeadError):  # which the cycle itself raises
                    await self._inner.abort(engine_id)
                await asyncio.sleep(_ABORT_RETRY_SECONDS)

        task = asyncio.create_task(until_gone())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _params(
        self, index: int, max_tokens: int | None, prompt: Sequence[int], *, is_continued: bool
    ) -> SamplingParams:
        """Sampling parameters of one cycle: its own seed, the remaining budgets, the format's end of a cycle.

        Stops of answers are the loop's: vLLM knows no answers."""
        call, end_ids = self._call, self._end_ids
        params = copy.copy(call.params)
        params.n, params.max_tokens = 1, max_tokens
        if params.seed is not None:
            params.seed = (params.seed + self._choice + index * _SEED_STRIDE) % _SEED_RANGE
        if is_continued:
            params.min_tokens, params.prompt_logprobs, params.skip_reading_prefix_cache = 0, None, False
        elif params.max_tokens is not None:
            params.min_tokens = min(params.min_tokens, params.max_tokens)
        if params.thinking_token_budget is not None:
            question = call.prompt["prompt_token_ids"]
            spent = num_thought_tokens(question, prompt, self, self._server.format)
            params.thinking_token_budget = max(0, params.thinking_token_budget - spent)
        end_texts = [self._end_text] if self._end_text and not end_ids else []
        if call.parses_reasoning:
            set_stops(params, end_texts, end_ids)
        else:
            set_stops(params, [*_as_list(params.stop), *end_texts], [*(params.stop_token_ids or ()), *end_ids])
        whole = params.output_kind is RequestOutputKind.FINAL_ONLY and not self._in_pieces
        params.output_kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
        # logprobs=-1 already returns the whole vocabulary.
        if self._server.logprobs is not None and stopping.needs_score(call.limits) and params.logprobs != -1:
            params.logprobs = max(self._server.logprobs, params.logprobs or 0)
        return params


def limits_of_call(limits: Limits, params: SamplingParams, *, parses_reasoning: bool) -> Limits:
    """``limits`` with the stops and the thinking budget of the sampling parameters.

    Stops end what the client sees: the answer where a reasoning parser separates it, else the whole text."""
    limits = replace(limits, thinking_tokens=params.thinking_token_budget)
    if params.temperature == 0 and limits.recursion is Continuation.FRESH and limits.policy is Policy.CONFIDENCE:
        limits = replace(limits, max_cycles=1)  # every attempt would be the same
    if not parses_reasoning:
        return limits
    return replace(
        limits,
        stop=tuple(_as_list(params.stop)),
        stop_token_ids=frozenset(params.stop_token_ids or ()),
        include_stop=params.include_stop_str_in_output,
    )


def fits_one_request(call: GenerateCall, server: ServerState) -> bool:
    """True when one engine request can generate all cycles of a choice.

    Only the model decides when to stop, the end of a cycle is one visible token, and no sampling parameter applies to
    each engine request separately."""
    limits, params = call.limits, call.params
    model_decides = (
        limits.policy is Policy.MODEL and not stopping.needs_score(limits) and stopping.max_cycles(limits) > 1
    )
    has_limits = params.stop or params.stop_token_ids or params.min_tokens or params.thinking_token_budget is not None
    is_plain = params.detokenize and not has_limits and params.structured_outputs is None
    return model_decides and is_plain and server.shows_cycle_end and bool(server.cycle_end_ids)


class OneRequestCycles:
    """All cycles of a choice from one engine request, split where they end.

    No prompt is read again between cycles. Tokens sampled after the last cycle are discarded."""

    def __init__(self, cycles: VllmCycles, server: ServerState, spans: "CycleSpans | None" = None) -> None:
        """cycles: with ``stops_at_cycle_end=False``."""
        self.end_of_turn_ids = cycles.end_of_turn_ids
        self._cycles, self._spans = cycles, spans
        (self._end_id,), self._end_text = server.cycle_end_ids, server.format.answer_close or ""
        self._stream: AsyncGenerator[Step, None] | None = None
        self._rest: Step | None = None

    @property
    def discarded_tokens(self) -> int:
        """Tokens after the last cycle that the engine has reported."""
        return 0 if self._rest is None else len(self._rest.token_ids)

    def encode(self, text: str) -> list[int]:
        return self._cycles.encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        """The first call makes the engine request; each later one continues where the previous cycle ended."""
        read = None
        if self._stream is None:
            self._stream = self._cycles.cycle(prompt_token_ids, index=index, max_tokens=max_tokens)
        else:
            read = len(prompt_token_ids)  # the whole prompt is in the engine's cache
            if self._spans is not None:
                self._spans.headers(index)  # starts the span of this cycle
        is_finished = False
        while not is_finished:
            step = await anext(self._stream) if self._rest is None else self._rest
            step, self._rest = split_step(step, self._end_id, self._end_text)
            is_finished = step.finished
            yield step if read is None else step._replace(prompt_tokens=read, cached_tokens=read)

    async def aclose(self) -> None:
        """Abort the engine request."""
        if self._stream is not None:
            await self._stream.aclose()


def split_step(step: Step, end_id: int, end_text: str) -> tuple[Step, Step | None]:
    """(step up to the end of a cycle, rest); (step, None) when no cycle ends in it.

    A step has several tokens when its reader was slow."""
    if end_id not in step.token_ids:
        return step, None
    end = list(step.token_ids).index(end_id) + 1
    if end == len(step.token_ids):
        return step._replace(finished=True), None
    before, tag, after = step.text.partition(end_text)
    first, last = slice(None, end), slice(end, None)
    head = _piece(step, before + tag, first, part_of(step.native, before + tag, first, is_last=False))
    return (
        head._replace(finished=True, truncated=False, ended_turn=False),
        _piece(step, after, last, part_of(step.native, after, last, is_last=True)),
    )


def _piece(step: Step, text: str, tokens: slice, native: Any) -> Step:
    logprobs = None if step.logprobs is None else step.logprobs[tokens]
    return step._replace(text=text, token_ids=step.token_ids[tokens], logprobs=logprobs, native=native)


async def count_spent(
    outputs: AsyncGenerator[RequestOutput, None], state: RequestState, kind: RequestOutputKind
) -> AsyncGenerator[RequestOutput, None]:
    """Pass ``outputs`` on; add tokens sampled, and read outside the prefix cache, to ``state.spent_tokens``."""
    is_first, sampled = True, dict[int, int]()
    async with aclosing(outputs):
        async for output in outputs:
            if is_first:
                is_first = False
                state.spent_tokens += len(output.prompt_token_ids or ()) - (output.num_cached_tokens or 0)
            for part in output.outputs:
                before = 0 if kind is RequestOutputKind.DELTA else sampled.get(part.index, 0)
                sampled[part.index] = len(part.token_ids)
                state.spent_tokens += sampled[part.index] - before
            yield output


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
