"""An AsyncLLM with scripted text, and a RecursiveEngine around it."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from vllm.config import StructuredOutputsConfig
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from rtap_core.artifact import Artifact, Logistic
from rtap_core.format import RTAP
from rtap_server.engine.recursive_engine import RecursiveEngine
from rtap_server.engine.request_state import RequestState, begin_request
from rtap_server.engine.server_state import Drain, ServerState
from rtap_server.http.recursion_fields import resolve_limits
from rtap_server.http.schema import RtapOptions
from rtap_server.settings import Settings
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics
from tests.core.scripted import EOS, ScriptedConfidence, decode, encode

QUESTION = encode("make 82?")
CLOSE = encode("</answer>")[0]


class Call(NamedTuple):
    """Arguments of one ``generate``."""

    prompt: Any
    params: SamplingParams
    request_id: str
    options: dict[str, Any]


@dataclass(eq=False, repr=False)
class FakeEngine:
    """Stops at stop tokens and ``max_tokens`` and honours the output kind, as vLLM does. It ignores stop strings.

    script: the n-th text for a prompt with n finished cycles, or a function of the prompt's text.
    encode, decode, end_of_turn_id: the tokenizer; the end of the turn follows each text unless it is None.
    ends_turn: each text ends the turn, even if a stop token is in it.
    size: tokens per output of a stream; None: all in one output.
    arrival_seconds: until the engine knows a request, and up to jitter_seconds more. token_seconds: for each token.
    num_instant: the first calls have no delay. go: cleared, it holds requests back.
    finish_reason: replaces that of a finished request.
    cached_tokens: the n-th call, from 0, reports n times as many cached tokens.
    calls: arguments of each ``generate``. aborted: ids of requests that ``abort`` has ended.
    num_sampled: tokens so far. num_closed: generators closed before their end.
    """

    model_config = SimpleNamespace(get_vocab_size=lambda: EOS + 1)
    vllm_config = SimpleNamespace(structured_outputs_config=StructuredOutputsConfig())

    script: Sequence[str] | Callable[[str], str]
    encode: Callable[[str], list[int]] = encode
    decode: Callable[[Sequence[int]], str] = decode
    end_of_turn_id: int | None = EOS
    ends_turn: bool = False
    size: int | None = None
    arrival_seconds: float = 0.0
    jitter_seconds: float = 0.0
    token_seconds: float = 0.0
    num_instant: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)
    finish_reason: str | None = None
    cached_tokens: int = 0
    calls: list[Call] = field(default_factory=list[Call])
    aborted: list[str] = field(default_factory=list[str])
    num_sampled: int = 0
    num_closed: int = 0
    _running: dict[str, list[asyncio.Event]] = field(default_factory=dict[str, list[asyncio.Event]])

    def __post_init__(self) -> None:
        self.go.set()

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        number, abort = len(self.calls), asyncio.Event()
        self.calls.append(Call(prompt, params, request_id, options))
        ids, reason = self._sample(prompt["prompt_token_ids"], params)
        is_instant = number < self.num_instant
        try:
            await self.go.wait()
            await asyncio.sleep(0 if is_instant else self.arrival_seconds + random.random() * self.jitter_seconds)
            self._running.setdefault(request_id, []).append(abort)
            async with aclosing(
                self._outputs(ids, reason, params, abort, 0 if is_instant else self.token_seconds)
            ) as parts:
                async for part in parts:
                    cached = number * self.cached_tokens
                    yield RequestOutput(
                        request_id=request_id, prompt=None, prompt_token_ids=prompt["prompt_token_ids"],
                        prompt_logprobs=None, outputs=[part], finished=part.finish_reason is not None,
                        num_cached_tokens=cached, num_cache_creation_tokens=10 * cached,
                    )  # fmt: skip
        except (GeneratorExit, asyncio.CancelledError):
            self.num_closed += 1
            raise
        finally:
            others = [other for other in self._running.pop(request_id, ()) if other is not abort]
            if others:
                self._running[request_id] = others

    async def abort(self, request_id: str | Iterable[str], **options: Any) -> None:
        """End every request under an id with its tokens so far. An id that has not arrived yet is ignored."""
        for name in (request_id,) if isinstance(request_id, str) else tuple(request_id):
            running = self._running.get(name, [])
            self.aborted += [name] * sum(not abort.is_set() for abort in running)
            for abort in running:
                abort.set()

    def _sample(self, prompt_token_ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
        """All tokens of a request and its finish reason."""
        if callable(self.script):
            text = self.script(self.decode(prompt_token_ids))
        else:
            text = self.script[prompt_token_ids.count(CLOSE)]
        ids = [*self.encode(text), *(() if self.end_of_turn_id is None else (self.end_of_turn_id,))]
        stops = {*(() if self.ends_turn else params.stop_token_ids or ()), self.end_of_turn_id}
        ids = ids[: next((n for n, token_id in enumerate(ids, 1) if token_id in stops), len(ids))]
        if params.max_tokens is not None and len(ids) > params.max_tokens:
            return ids[: params.max_tokens], self.finish_reason or "length"
        return ids, self.finish_reason or "stop"

    async def _outputs(
        self, ids: list[int], reason: str, params: SamplingParams, abort: asyncio.Event, token_seconds: float
    ) -> AsyncGenerator[CompletionOutput, None]:
        """Outputs of one request in its own kind."""
        is_delta = params.output_kind is RequestOutputKind.DELTA
        size, reported = self.size or max(1, len(ids)), 0
        for at in range(0, max(1, len(ids)), size):
            end = min(at + size, len(ids))
            if token_seconds:
                with suppress(TimeoutError):
                    async with asyncio.timeout(token_seconds * (end - at)):
                        await abort.wait()
            if abort.is_set():
                yield self._part(ids[reported if is_delta else 0 : at], "abort", params)
                return
            self.num_sampled += end - at
            is_last = end == len(ids)
            if is_last or params.output_kind is not RequestOutputKind.FINAL_ONLY:
                yield self._part(ids[reported if is_delta else 0 : end], reason if is_last else None, params)
                reported = end

    def _part(self, ids: list[int], reason: str | None, params: SamplingParams) -> CompletionOutput:
        is_stopped = reason == "stop" and not self.ends_turn and bool(ids) and ids[-1] in (params.stop_token_ids or ())
        stop = ids[-1] if is_stopped else None
        shown = ids if stop is None or params.include_stop_str_in_output else ids[:-1]
        return CompletionOutput(
            index=0, text=self.decode(shown), token_ids=ids, cumulative_logprob=None,
            logprobs=None if params.logprobs is None else [{i: Logprob(-0.5, 1, self.decode([i]))} for i in ids],
            finish_reason=reason, stop_reason=stop,
        )  # fmt: skip


def build(llm: FakeEngine, confidence: Any = None, *, tracing: Any = None, **server: Any) -> RecursiveEngine:
    """A RecursiveEngine on ``llm``. server: fields of its ServerState. By default answers with 82 are sure."""
    state = ServerState(
        settings=Settings(confidence_model="http://generator"), format=RTAP,
        confidence=confidence or ScriptedConfidence(lambda text: 0.9 if "82" in text else 0.1),
        generator=Artifact(logistic=Logistic(bias=0.0, generator=1.0)),  # votes weigh only calibrated confidences
        count_oops=lambda text: text.count("Oops"), encode=llm.encode,
        decode=lambda token_ids, _: llm.decode(token_ids),
        end_of_turn_ids=frozenset({EOS}), metrics=Metrics(CollectorRegistry()), feedback=Feedback(None), drain=Drain(),
    )  # fmt: skip
    return RecursiveEngine(llm, replace(state, **server), tracing)  # type: ignore[arg-type]


def ask(engine: RecursiveEngine, *, rtap: dict[str, Any] | None = None, prompt: Any = None, **wanted: Any):
    """The stream of one request, and its state. wanted: sampling parameters, and options, owner and id."""
    options, server, request_id = wanted.pop("options", {}), engine._server, wanted.pop("id", "request")
    limits = resolve_limits(
        RtapOptions(**{"threshold": 0.5} | (rtap or {})), server.settings, server.generator, has_confidence=True
    )
    state = RequestState("of-the-client", limits=limits, owner=wanted.pop("owner", b""))
    begin_request(state)
    params = SamplingParams(**{"max_tokens": 200, "output_kind": RequestOutputKind.FINAL_ONLY} | wanted)
    return engine.generate(prompt or {"prompt_token_ids": QUESTION}, params, request_id, **options), state


async def all_of(stream: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    async with aclosing(stream):
        return [output async for output in stream]
