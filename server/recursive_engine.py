"""Recursion as an engine: RecursiveEngine stands where vLLM's AsyncLLM stands, so every route of vLLM recurses.

``generate`` runs the loop of ``server.rtap.recursion`` for requests of an exchange (the four text endpoints) and
passes everything else through. Sampling, batching, caching, LoRA, logprobs and multimodal inputs stay vLLM's: a cycle
is an ordinary ``AsyncLLM.generate`` on the token ids so far.
"""

import asyncio
import copy
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.drain import Drain
from server.feedback import Feedback
from server.gate import Visit, current_visit, salted
from server.metrics import Metrics
from server.outputs import Call, Writer
from server.rtap.artifact import Artifact
from server.rtap.cutoff import Cutoff
from server.rtap.errors import InvalidRequest
from server.rtap.format import TrajectoryFormat
from server.rtap.probing import Probing
from server.rtap.recursion import CycleEvent, FinalEvent, Recursion
from server.rtap.stopping import needs_score
from server.rtap.types import Confidence, Engine, Policy, Step, StopReason, Trajectory
from server.settings import Settings
from server.wire import Exchange, RtapOptions, current_exchange, options_from_xargs, resolve_limits

if TYPE_CHECKING:
    from server.tracing import CycleSpans, Tracing

# Cycle seeds of one request are spread by a prime so that n choices (seed + index, as vLLM does) never meet them.
_SEED_STRIDE = 1_000_003
_SEED_RANGE = 2**63
_ABORT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """What every request shares: the format, the scorer, defaults, counters; spans, where they are asked for."""

    settings: Settings
    format: TrajectoryFormat
    confidence: Confidence | None
    generator: Artifact
    count_oops: Callable[[str], int]
    encode: Callable[[str], list[int]]
    end_of_turn_ids: frozenset[int]
    metrics: Metrics
    feedback: Feedback
    drain: Drain
    logprobs: int | None = None
    tracing: "Tracing | None" = None

    @property
    def cycle_end_ids(self) -> list[int]:
        """The one token that ends a cycle, where the format has such a tag as a token of its own."""
        ids = self.encode(self.format.answer_close) if self.format.answer_close else []
        return ids if len(ids) == 1 else []


class RecursiveEngine:
    """An EngineClient around an AsyncLLM. Whatever is not defined here is the wrapped engine's."""

    def __init__(self, inner: EngineClient, plan: Plan) -> None:
        self._inner = inner
        self._plan = plan
        self._live: dict[str, list[set[str]]] = {}  # by outer id, which clients may use twice at once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request over all its cycles, in the request's own output kind.

        Raises VLLMValidationError (400) before anything is generated when the request cannot recurse as asked."""
        exchange, visit = current_exchange(), current_visit()
        if visit is not None and isinstance(prompt, dict):
            prompt = salted(cast(dict[str, Any], prompt))
        if exchange is None:
            outputs = self._inner.generate(prompt, sampling_params, request_id, **options)
            return outputs if visit is None else _metered(outputs, visit, sampling_params.output_kind)
        try:
            call = self._call(exchange, prompt, sampling_params, request_id, options)
        except InvalidRequest as error:
            raise VLLMValidationError(str(error), parameter=error.param) from error
        return self._outputs(call)

    async def abort(self, request_id: str | Iterable[str], **options: Any) -> None:
        """Abort requests by their outer ids: the cycles being written for them, and pass-through ones."""
        outer = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        live = [inner for name in outer for cycles in self._live.get(name, ()) for inner in cycles]
        await self._inner.abort([*outer, *live], **options)

    def _call(
        self, exchange: Exchange, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> Call:
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise InvalidRequest("recursion continues on token ids; prompt embeddings are not supported here")
        by_xargs = options_from_xargs(params.extra_args, self._plan.settings)
        if by_xargs is not None and exchange.options is not None:
            raise InvalidRequest("give the rtap options once: as 'rtap' or as 'vllm_xargs'", param="rtap")
        limits = resolve_limits(
            by_xargs or exchange.options or RtapOptions(),
            self._plan.settings,
            self._plan.generator,
            has_confidence=self._plan.confidence is not None,
            max_tokens=params.max_tokens,
            effort=exchange.effort,
        )
        return Call(
            exchange=exchange,
            first_choice=exchange.reserve(params.n),
            prompt=cast(dict[str, Any], prompt),
            params=params,
            request_id=request_id,
            options=options,
            limits=limits,
            split=options.get("reasoning_parser_kwargs") is not None,
            visit=current_visit(),
        )

    async def _outputs(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        live = set[str]()
        self._live.setdefault(call.request_id, []).append(live)
        try:
            with self._plan.metrics.in_flight():
                if call.params.n == 1:
                    async with aclosing(self._choice(call, 0, live)) as outputs:
                        async for output in outputs:
                            yield output
                else:
                    async with aclosing(self._choices(call, live)) as outputs:
                        async for output in outputs:
                            yield output
        finally:
            calls = [other for other in self._live[call.request_id] if other is not live]
            if calls:
                self._live[call.request_id] = calls
            else:
                del self._live[call.request_id]

    async def _choices(self, call: Call, live: set[str]) -> AsyncGenerator[RequestOutput, None]:
        """``n`` trajectories side by side, merged as AsyncLLM merges samples: one output for FINAL_ONLY."""
        queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue()

        async def run(choice: int) -> None:
            try:
                async with aclosing(self._choice(call, choice, live)) as outputs:
                    async for output in outputs:
                        queue.put_nowait(output)
            except Exception as error:  # handed to the reader below, which raises it
                queue.put_nowait(error)
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(run(choice)) for choice in range(call.params.n)]
        running, final = len(tasks), list[CompletionOutput]()
        try:
            while running:
                output = await queue.get()
                if output is None:
                    running -= 1
                elif isinstance(output, BaseException):
                    raise output
                elif call.params.output_kind is RequestOutputKind.FINAL_ONLY:
                    final.extend(output.outputs)
                    if len(final) == len(tasks):
                        output.outputs = sorted(final, key=lambda o: o.index)
                        yield output
                else:
                    output.finished = output.finished and running == 1
                    yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_idle(self) -> bool:
        """Whether a cycle that may be thrown away would take nothing from others. Only a classifier's verdict is waited
        for beside an engine that has nothing to do: yesno asks that same engine, logprob waits for nothing."""
        if self._plan.settings.confidence_kind not in ("pooling", "remote"):
            return False
        writing = sum(len(live) for calls in self._live.values() for live in calls)
        return writing < self._plan.settings.speculate_below

    def _probing(self, engine: Engine, call: Call) -> Probing | None:
        """``engine`` with probes, where the request wants them and a score can end its thoughts."""
        plan, limits = self._plan, call.limits
        if limits.probe_every is None or limits.policy is not Policy.CONFIDENCE or plan.confidence is None:
            return None
        # Somebody else began the cycle, perhaps its answer; or a grammar binds answers, from a tag the model writes.
        if call.exchange.prefix or call.params.structured_outputs is not None:
            return None
        return Probing(
            engine,
            plan.format,
            plan.confidence,
            question=call.prompt["prompt_token_ids"],
            request=call,
            every=limits.probe_every,
            threshold=limits.threshold,
            answer_tokens=plan.settings.probe_answer_tokens,
        )

    async def _choice(self, call: Call, choice: int, live: set[str]) -> AsyncGenerator[RequestOutput, None]:
        """One trajectory as RequestOutputs."""
        plan, number = self._plan, call.first_choice + choice
        writer = Writer(call, choice, plan.format)
        finished = False
        with plan.drain.cutoff(call.limits.deadline_seconds) as cutoff:
            spans = None if plan.tracing is None else plan.tracing.cycles(call, choice)
            engine = _Cycles(self._inner, plan, call, choice, live, cutoff, spans)
            probing = self._probing(engine, call)
            loop = Recursion(
                engine if probing is None else probing,
                plan.format,
                plan.confidence,
                plan.count_oops,
                prefix=call.exchange.prefix,
                request=call,
                is_idle=self._is_idle,
                cutoff=cutoff,
            )
            try:
                async with aclosing(loop.run(call.prompt["prompt_token_ids"], call.limits)) as events:
                    async for event in events:
                        if isinstance(event, CycleEvent):
                            call.exchange.pending.append((number, event.cycle))
                            if spans is not None:
                                spans.judged(event.cycle)
                        elif isinstance(event, FinalEvent):
                            finished = True
                            trajectory = _with_probes(event.trajectory, probing)
                            call.exchange.trajectories[number] = trajectory
                            plan.metrics.observe(trajectory, max_cycles=call.limits.max_cycles)
                        for output in writer.write(event):
                            yield output
            except CycleAborted as aborted:
                for output in writer.abort(aborted.finish_reason):
                    yield output
            finally:
                if spans is not None:
                    spans.close()
                if not finished:
                    plan.metrics.abandoned(call.limits.policy)


def _with_probes(trajectory: Trajectory, probing: Probing | None) -> Trajectory:
    if probing is None:
        return trajectory
    return replace(
        trajectory,
        discarded_tokens=trajectory.discarded_tokens + probing.discarded_tokens,
        probe_confidence_tokens=probing.confidence_tokens,
        num_probes=probing.num_probes,
        num_stopped=probing.num_stopped,
    )


# vLLM asks isinstance(client, EngineClient); delegation by __getattr__ serves the methods, which inheriting the
# abstract class would hide behind its NotImplementedError defaults.
EngineClient.register(RecursiveEngine)


class CycleAborted(Exception):
    """The engine gave up a cycle: ``abort`` by a route of vLLM's, ``error``, or ``repetition``. Ends the request."""

    def __init__(self, finish_reason: str) -> None:
        super().__init__(finish_reason)
        self.finish_reason = finish_reason


class _Cycles:
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
    ) -> None:
        self._inner, self._plan, self._call, self._choice, self._live = inner, plan, call, choice, live
        self._cutoff, self._spans = cutoff, spans
        self._aborts: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
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
                outputs = _metered(outputs, call.visit, params.output_kind)
            with self._cutoff.calling(lambda: self._abort(name)):
                async with aclosing(outputs):
                    async for output in outputs:
                        part = output.outputs[0]
                        if part.finish_reason not in (None, "stop", "length") and not self._is_cut(part.finish_reason):
                            raise CycleAborted(part.finish_reason)
                        yield self._step(output, part)
        finally:
            self._live.discard(name)

    def _step(self, output: RequestOutput, part: CompletionOutput) -> Step:
        ends, closing = self._plan.cycle_end_ids, self._plan.format.answer_close
        cycle_ended = part.stop_reason in ends or (not ends and part.stop_reason == closing is not None)
        is_hidden = cycle_ended and not self._call.params.include_stop_str_in_output
        return Step(
            text=part.text + (closing or "") if is_hidden else part.text,
            token_ids=part.token_ids,
            finished=output.finished,
            truncated=part.finish_reason == "length",
            ended_turn=part.finish_reason == "stop" and not cycle_ended,
            prompt_tokens=len(output.prompt_token_ids or ()),
            cached_tokens=output.num_cached_tokens or 0,
            native=output,
            logprobs=cast(Any, part.logprobs),
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
        call, ends = self._call, self._plan.cycle_end_ids
        params = copy.copy(call.params)
        params.n, params.max_tokens = 1, max_tokens
        params.skip_clone = False  # this copy shares what AsyncLLM may change
        if params.seed is not None:
            params.seed = (params.seed + self._choice + index * _SEED_STRIDE) % _SEED_RANGE
        if is_continued:
            params.min_tokens, params.prompt_logprobs, params.skip_reading_prefix_cache = 0, None, False
        elif params.max_tokens is not None:
            params.min_tokens = min(params.min_tokens, params.max_tokens)
        if ends:
            params.stop_token_ids = [*(params.stop_token_ids or ()), *ends]
            params._all_stop_token_ids = {*params._all_stop_token_ids, *ends}  # pyright: ignore[reportPrivateUsage]
        elif self._plan.format.answer_close:
            params.stop = [*_as_list(params.stop), self._plan.format.answer_close]
            params.output_text_buffer_length = max(len(s) for s in params.stop) - 1
        whole = params.output_kind is RequestOutputKind.FINAL_ONLY and not may_be_cut
        params.output_kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
        if self._plan.logprobs is not None and needs_score(call.limits) and params.logprobs != -1:  # -1 is all of them
            params.logprobs = max(self._plan.logprobs, params.logprobs or 0)
        return params


async def _metered(
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
