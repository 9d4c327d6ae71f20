"""Recursion as an engine: RecursiveEngine stands where vLLM's AsyncLLM stands, so every route of vLLM recurses.

``generate`` runs the loop of ``rtap_core.recursion`` for requests of an exchange (the four text endpoints) and
passes everything else through. Sampling, batching, caching, LoRA, logprobs and multimodal inputs stay vLLM's: a cycle
is an ordinary ``AsyncLLM.generate`` on the token ids so far.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, cast

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.errors import InvalidRequest
from rtap_core.probing import Probing
from rtap_core.recursion import CycleEvent, FinalEvent, Recursion
from rtap_core.types import Engine, Policy, Trajectory
from rtap_server.engine.output_writer import Call, Writer
from rtap_server.engine.server_state import Plan
from rtap_server.engine.turn import Turn, is_written_through
from rtap_server.engine.vllm_cycles import CycleAborted, Cycles, metered
from rtap_server.http.auth import current_visit, salted
from rtap_server.http.schema import Exchange, RtapOptions, current_exchange, resolve_limits


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
            return outputs if visit is None else metered(outputs, visit, sampling_params.output_kind)
        try:
            call = self._call(exchange, prompt, sampling_params, request_id, options)
        except InvalidRequest as error:
            raise VLLMValidationError(str(error), parameter=error.param) from error
        return self._choice(call, 0) if call.params.n == 1 else self._choices(call)

    async def abort(self, request_id: str | Iterable[str], **options: Any) -> None:
        """Abort requests by their outer ids: the cycles being written for them, and pass-through ones."""
        outer = (request_id,) if isinstance(request_id, str) else tuple(request_id)
        live = [inner for name in outer for choice in self._live.get(name, ()) for inner in choice]
        await self._inner.abort([*outer, *live], **options)

    def _call(
        self, exchange: Exchange, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> Call:
        if not isinstance(prompt, dict) or "prompt_token_ids" not in prompt:
            raise InvalidRequest("recursion continues on token ids; prompt embeddings are not supported here")
        limits = resolve_limits(
            exchange.options or RtapOptions(),
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

    @contextmanager
    def _living(self, request_id: str) -> Generator[set[str]]:
        """Around one choice: where the names of its cycles are while they are being written."""
        live = set[str]()
        self._live.setdefault(request_id, []).append(live)
        try:
            yield live
        finally:
            others = [other for other in self._live[request_id] if other is not live]
            if others:
                self._live[request_id] = others
            else:
                del self._live[request_id]

    async def _choices(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        """``n`` trajectories side by side, merged as AsyncLLM merges samples: one output for FINAL_ONLY."""
        queue: asyncio.Queue[RequestOutput | BaseException | None] = asyncio.Queue()

        async def run(choice: int) -> None:
            try:
                async with aclosing(self._choice(call, choice)) as outputs:
                    async for output in outputs:
                        queue.put_nowait(output)
            except Exception as error:  # handed to the reader below, which raises it
                queue.put_nowait(error)
            finally:
                queue.put_nowait(None)

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

    def _is_idle(self) -> bool:
        """Whether a cycle that may be thrown away would take nothing from others. Only a classifier's verdict is waited
        for beside an engine that has nothing to do: yesno asks that same engine, logprob waits for nothing."""
        if self._plan.settings.confidence_kind not in ("pooling", "remote"):
            return False
        writing = sum(len(live) for choices in self._live.values() for live in choices)
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

    async def _choice(self, call: Call, choice: int) -> AsyncGenerator[RequestOutput, None]:
        """One trajectory as RequestOutputs."""
        plan, number = self._plan, call.first_choice + choice
        writer = Writer(call, choice, plan.format)
        finished = False
        with self._living(call.request_id) as live, plan.drain.cutoff(call.limits.deadline_seconds) as cutoff:
            spans = None if plan.tracing is None else plan.tracing.cycles(call, choice)
            runs_on = is_written_through(call, plan)
            cycles = Cycles(self._inner, plan, call, choice, live, cutoff, spans, runs_on=runs_on)
            turn = Turn(cycles, plan, spans) if runs_on else None
            engine = turn or cycles
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
                            trajectory = _with_discarded(_with_probes(event.trajectory, probing), turn)
                            call.exchange.trajectories[number] = trajectory
                            plan.metrics.observe(trajectory, max_cycles=call.limits.max_cycles)
                        for output in writer.write(event):
                            yield output
            except CycleAborted as aborted:
                for output in writer.abort(aborted.finish_reason):
                    yield output
            finally:
                if turn is not None:
                    await turn.aclose()
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


def _with_discarded(trajectory: Trajectory, turn: Turn | None) -> Trajectory:
    if turn is None or not turn.discarded_tokens:
        return trajectory
    return replace(trajectory, discarded_tokens=trajectory.discarded_tokens + turn.discarded_tokens)


# vLLM asks isinstance(client, EngineClient); delegation by __getattr__ serves the methods, which inheriting the
# abstract class would hide behind its NotImplementedError defaults.
EngineClient.register(RecursiveEngine)
