"""Recursion as an engine: ``RecursiveEngine`` wraps vLLM's AsyncLLM, so every route of vLLM recurses.

``generate`` runs the loop of ``rtap_core.recursion`` for requests of the four recursive endpoints and passes all others
through. Sampling, batching, caching, LoRA, logprobs and multimodal inputs stay vLLM's: a cycle is an ordinary
``AsyncLLM.generate`` on the token ids so far.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.recursion import CycleEvent, FinalEvent, Recursion
from rtap_core.types import Limits, Trajectory
from rtap_server.engine.grammars import constrained
from rtap_server.engine.output_writer import GenerateCall, OutputWriter
from rtap_server.engine.request_state import RequestState, current_request, salted_prompt
from rtap_server.engine.server_state import ServerState
from rtap_server.engine.vllm_compat import check_stop_token_ids
from rtap_server.engine.vllm_cycles import (
    CycleAborted,
    OneRequestCycles,
    VllmCycles,
    count_spent,
    fits_one_request,
    limits_of_call,
)
from rtap_server.telemetry.logs import ERRORS

# vLLM answers these with their own message, and not with 500.
_CLIENT_ERRORS = (VLLMClientError, GracefulHTTPError, ValueError, TypeError, OverflowError)
_logger = logging.getLogger(ERRORS)
_OUTPUTS_PER_TURN = 16

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import Tracing


class RecursiveEngine:
    """An EngineClient around an AsyncLLM. Attributes not defined here are the wrapped engine's.

    Engine request ids are unique per server run, whatever ids the routes use: vLLM aborts every request with an id."""

    def __init__(self, inner: EngineClient, server: ServerState, tracing: "Tracing | None" = None) -> None:
        self._inner, self._server, self._tracing = inner, server, tracing
        self._numbers = itertools.count()
        self._running: dict[str, list[set[str]]] = {}  # engine ids by the id of the route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request over all its cycles, in the request's own output kind.

        Raises VLLMValidationError (400) for a prompt that cannot be continued."""
        state = current_request()
        if isinstance(prompt, dict):
            prompt = salted_prompt(cast(dict[str, Any], prompt))
        outputs = self._outputs(state, prompt, sampling_params, request_id, options)
        if sampling_params.structured_outputs is None:
            return outputs
        config = self._inner.vllm_config.structured_outputs_config
        return constrained(outputs, sampling_params.structured_outputs, config)

    def _outputs(
        self,
        state: RequestState,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        if state.limits is None:
            return self._passed_through(state, prompt, sampling_params, request_id, options)
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise VLLMValidationError("prompt embeddings are not supported: recursion continues on token ids")
        if sampling_params.stop_token_ids:  # which may never reach the engine
            check_stop_token_ids(sampling_params, self._inner.model_config)
        parses_reasoning = options.get("reasoning_parser_kwargs") is not None
        call = GenerateCall(
            state=state,
            first_choice=state.reserve_choices(sampling_params.n),
            prompt=cast(dict[str, Any], prompt),
            params=sampling_params,
            request_id=request_id,
            options=options,
            limits=replace(
                limits_of_call(state.limits, sampling_params, parses_reasoning=parses_reasoning),
                max_tokens=_smaller(sampling_params.max_tokens, state.max_tokens),
            ),
            parses_reasoning=parses_reasoning,
        )
        return self._choice(call, 0) if sampling_params.n == 1 else self._choices(call)

    def encode(self, prompt: Any, pooling_params: Any, request_id: str, **options: Any) -> Any:
        """The wrapped engine's ``encode`` under a unique id."""
        return self._inner.encode(prompt, pooling_params, self._engine_id(request_id), **options)

    async def abort(self, request_id: str | Iterable[str], **options: Any) -> None:
        """Abort all engine requests that belong to the routes' ``request_id``."""
        ids = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        running = [engine_id for name in ids for group in self._running.get(name, ()) for engine_id in group]
        await self._inner.abort(running, **options)

    def _engine_id(self, request_id: str) -> str:
        return f"{request_id}-{next(self._numbers)}"

    async def _passed_through(
        self, state: RequestState, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The wrapped engine's outputs, under the id that the route knows."""
        engine_id = self._engine_id(request_id)
        with self._registered(request_id) as running, _failures_logged(state):
            running.add(engine_id)
            outputs = self._inner.generate(prompt, params, engine_id, **options)
            if state.owner:  # only API keys have token limits
                outputs = count_spent(outputs, state, params.output_kind)
            async with aclosing(outputs):
                async for output in outputs:
                    output.request_id = request_id
                    yield output

    @contextmanager
    def _registered(self, request_id: str) -> Generator[set[str]]:
        """The set of engine ids that run for one choice of the route's ``request_id``."""
        running = set[str]()
        self._running.setdefault(request_id, []).append(running)
        try:
            yield running
        finally:
            others = [other for other in self._running[request_id] if other is not running]
            if others:
                self._running[request_id] = others
            else:
                del self._running[request_id]

    async def _choices(self, call: GenerateCall) -> AsyncGenerator[RequestOutput, None]:
        """``n`` trajectories in parallel, merged as AsyncLLM merges samples: one output for FINAL_ONLY.

        A reader that does not read holds them up."""
        queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue(call.params.n)

        async def run(choice: int) -> None:
            try:
                async with aclosing(self._choice(call, choice)) as outputs:
                    async for output in outputs:
                        await queue.put(output)
                await queue.put(None)
            except Exception as error:  # raised again by the reader below
                await queue.put(error)

        tasks = [asyncio.create_task(run(choice)) for choice in range(call.params.n)]
        running = unfinished = len(tasks)
        final = list[CompletionOutput]()
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
                    unfinished -= output.finished
                    output.finished = not unfinished
                    yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(self, call: GenerateCall, choice: int) -> AsyncGenerator[RequestOutput, None]:
        """One trajectory as RequestOutputs."""
        server, state, index = self._server, call.state, call.first_choice + choice
        writer = OutputWriter(call, choice, server.format)
        is_finished = False
        with (
            self._registered(call.request_id) as running,
            _failures_logged(state),
            server.drain.cutoff(_seconds_left(state, call.limits)) as cutoff,
        ):
            spans = None
            if self._tracing is not None:
                spans = self._tracing.start_cycles(state.model, index, call.options.get("trace_headers"))
            is_one_request = fits_one_request(call, server)
            # Log-probabilities are sorted by step. A key with a token limit pays for a reply that it does not wait for.
            sorts_logprobs = call.parses_reasoning and call.params.logprobs is not None
            cycles = VllmCycles(
                self._inner,
                server,
                call,
                choice,
                self._engine_id,
                running,
                cutoff,
                spans,
                stops_at_cycle_end=not is_one_request,
                in_pieces=sorts_logprobs or state.tokens_per_minute is not None,
            )
            one_request = OneRequestCycles(cycles, server, spans) if is_one_request else None
            loop = Recursion(
                one_request or cycles,
                server.format,
                server.scorer(call.limits.policy),
                server.count_oops,
                prefix=state.prefix,
                request=call,
                cutoff=cutoff,
                drafts=writer.shows_drafts,
            )
            try:
                async with aclosing(loop.run(call.prompt["prompt_token_ids"], call.limits)) as events:
                    async for event in events:
                        if isinstance(event, CycleEvent):
                            state.cycles.append((index, event.cycle))
                            if spans is not None:
                                spans.end_cycle(event.cycle)
                        elif isinstance(event, FinalEvent):
                            is_finished = True
                            trajectory = _with_discarded(event.trajectory, one_request)
                            state.trajectories[index] = trajectory
                            server.metrics.observe(trajectory, max_cycles=call.limits.max_cycles)
                        for number, output in enumerate(writer.write(event), 1):
                            yield output
                            if number % _OUTPUTS_PER_TURN == 0:  # a long answer is released at once
                                await asyncio.sleep(0)
            except CycleAborted as aborted:
                for output in writer.abort(aborted.finish_reason):
                    yield output
            finally:
                if one_request is not None:
                    await one_request.aclose()
                if spans is not None:
                    spans.close()
                if not is_finished:
                    server.metrics.count_abandoned(call.limits.policy)


def _seconds_left(state: RequestState, limits: Limits) -> float | None:
    """Seconds to the deadline, which counts from the first byte of the request."""
    deadline = limits.deadline_seconds
    return None if deadline is None else max(0.0, deadline - (time.monotonic() - state.started))


def _smaller(one: int | None, other: int | None) -> int | None:
    """The smaller of two limits; None: no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


@contextmanager
def _failures_logged(state: RequestState) -> Generator[None]:
    """Log a failure of the engine under the request id, which the client's error names.

    vLLM turns many exceptions into responses itself, and logs them without that id."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _CLIENT_ERRORS) and not state.is_failure_logged:
            state.is_failure_logged = True
            _logger.exception("request %s failed", state.request_id)
        raise


def _with_discarded(trajectory: Trajectory, one_request: OneRequestCycles | None) -> Trajectory:
    if one_request is None or not one_request.discarded_tokens:
        return trajectory
    return replace(trajectory, discarded_tokens=one_request.discarded_tokens)


# vLLM tests isinstance(client, EngineClient). Registering keeps __getattr__ delegation, which inheriting would hide
# behind the abstract class's NotImplementedError defaults.
EngineClient.register(RecursiveEngine)
