"""One cycle on vLLM: an ordinary ``AsyncLLM.generate`` on the token ids so far, as the loop's Engine protocol has it.

It knows neither the loop nor what a cycle is worth.
"""

import asyncio
import copy
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

from vllm.engine.protocol import EngineClient
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.cutoff import Cutoff
from rtap_core.stopping import needs_score
from rtap_core.types import Step, StopReason
from rtap_server.engine.output_writer import Call
from rtap_server.engine.server_state import Plan
from rtap_server.http.auth import Visit

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import CycleSpans

# Cycle seeds of one request are spread by a prime so that n choices (seed + index, as vLLM does) never meet them.
_SEED_STRIDE = 1_000_003
_SEED_RANGE = 2**63
_ABORT_SECONDS = 0.05


class CycleAborted(Exception):
    """The engine gave up a cycle: ``abort`` by a route of vLLM's, ``error``, or ``repetition``. Ends the request."""

    def __init__(self, finish_reason: str) -> None:
        super().__init__(finish_reason)
        self.finish_reason = finish_reason


class Cycles:
    """The loop's Engine protocol on an AsyncLLM, bound to one choice of one request."""

    def __init__(
        self,
        inner: EngineClient,
        plan: Plan,
        call: Call,
        choice: int,
        live: set[str],
        cutoff: Cutoff,
        spans: "CycleSpans | None" = None,
        *,
        runs_on: bool = False,
    ) -> None:
        """runs_on: the engine does not stop at the end of a cycle."""
        self._inner, self._plan, self._call, self._choice, self._live = inner, plan, call, choice, live
        self._cutoff, self._spans = cutoff, spans
        self._aborts: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._ends = [] if runs_on else plan.cycle_end_ids
        self._closing = None if runs_on else plan.format.answer_close
        self.end_of_turn_ids = plan.end_of_turn_ids

    def encode(self, text: str) -> list[int]:
        return self._plan.encode(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None, may_be_cut: bool
    ) -> AsyncGenerator[Step, None]:
        call = self._call
        starts = len(prompt_token_ids) == len(call.prompt["prompt_token_ids"])
        prompt = call.prompt if starts else call.prompt_with(prompt_token_ids)
        name = f"{call.request_id}-c{self._choice}.{next(self._numbers)}"  # a cycle may be probed while it is written
        params = self._params(index, max_tokens, is_continued=not starts, may_be_cut=may_be_cut)
        self._live.add(name)
        try:
            options: dict[str, Any] = {**call.options, "reasoning_ended": False} if call.split else call.options
            if self._spans is not None:
                options = {**options, "trace_headers": self._spans.headers(index)}
            outputs = self._inner.generate(cast(Any, prompt), params, name, **options)
            if call.visit is not None:
                outputs = metered(outputs, call.visit, params.output_kind)
            with self._cutoff.calling(lambda: self._abort(name)):
                async with aclosing(outputs):
                    async for output in outputs:
                        part = output.outputs[0]
                        yield self._step(output, part) if part.finish_reason is None else self._last(output, part)
        finally:
            self._live.discard(name)

    def _step(self, output: RequestOutput, part: CompletionOutput) -> Step:
        read, cached = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
        return Step(part.text, part.token_ids, False, False, False, read, cached, output, cast(Any, part.logprobs))

    def _last(self, output: RequestOutput, part: CompletionOutput) -> Step:
        """The step with which the engine says why the cycle ends. Raises CycleAborted."""
        reason = part.finish_reason
        if reason is not None and reason not in ("stop", "length") and not self._is_cut(reason):
            raise CycleAborted(reason)
        ends, closing = self._ends, self._closing
        cycle_ended = part.stop_reason in ends or (not ends and part.stop_reason == closing is not None)
        is_hidden = cycle_ended and not self._call.params.include_stop_str_in_output
        return self._step(output, part)._replace(
            text=part.text + (closing or "") if is_hidden else part.text,
            finished=True,
            truncated=reason == "length",
            ended_turn=reason == "stop" and not cycle_ended,
        )

    def _is_cut(self, finish_reason: str) -> bool:
        """Whether the engine gave the cycle up because the trajectory is to end. A signal to the whole process group,
        which is what Ctrl-C sends, makes engines give up what they have before anybody cuts it."""
        if finish_reason == "abort" and self._plan.drain.has_begun:
            self._cutoff.cut(StopReason.DRAINED)
        return finish_reason == "abort" and self._cutoff.reason is not None

    def _abort(self, name: str) -> None:
        """Make the engine end a cycle with what it has."""

        async def until_gone() -> None:
            while name in self._live:  # it may be on its way to the engine, which would not know it yet
                await self._inner.abort(name)
                await asyncio.sleep(_ABORT_SECONDS)

        task = asyncio.create_task(until_gone())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def _params(self, index: int, max_tokens: int | None, *, is_continued: bool, may_be_cut: bool) -> SamplingParams:
        """The request's sampling parameters for one cycle: its own seed, the rest of the budget, the format's end."""
        call, ends = self._call, self._ends
        params = copy.copy(call.params)
        params.n, params.max_tokens = 1, max_tokens
        # The one thing in it that AsyncLLM changes in place; the rest may be shared.
        params._all_stop_token_ids = {*params._all_stop_token_ids, *ends}  # pyright: ignore[reportPrivateUsage]
        if params.seed is not None:
            params.seed = (params.seed + self._choice + index * _SEED_STRIDE) % _SEED_RANGE
        if is_continued:
            params.min_tokens, params.prompt_logprobs, params.skip_reading_prefix_cache = 0, None, False
        elif params.max_tokens is not None:
            params.min_tokens = min(params.min_tokens, params.max_tokens)
        if ends:
            params.stop_token_ids = [*(params.stop_token_ids or ()), *ends]
        elif self._closing:
            params.stop = [*_as_list(params.stop), self._closing]
            params.output_text_buffer_length = max(len(s) for s in params.stop) - 1
        whole = params.output_kind is RequestOutputKind.FINAL_ONLY and not may_be_cut
        params.output_kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
        if self._plan.logprobs is not None and needs_score(call.limits) and params.logprobs != -1:  # -1 is all of them
            params.logprobs = max(self._plan.logprobs, params.logprobs or 0)
        return params


async def metered(
    outputs: AsyncGenerator[RequestOutput, None], visit: Visit, kind: RequestOutputKind
) -> AsyncGenerator[RequestOutput, None]:
    """``outputs`` as they come; what was sampled, and read outside the prefix cache, is charged to the visit."""
    is_read, written = False, dict[int, int]()
    async with aclosing(outputs):
        async for output in outputs:
            if not is_read:
                is_read = True
                visit.spent_tokens += len(output.prompt_token_ids or ()) - (output.num_cached_tokens or 0)
            for part in output.outputs:
                before = 0 if kind is RequestOutputKind.DELTA else written.get(part.index, 0)
                written[part.index] = len(part.token_ids)
                visit.spent_tokens += written[part.index] - before
            yield output


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
