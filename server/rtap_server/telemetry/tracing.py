"""OpenTelemetry spans of recursion: ``invoke_workflow`` a request and, below it, ``chat MODEL`` a cycle.

They go where vLLM sends its own (``--otlp-traces-endpoint``), through the provider that it sets up, and vLLM's
``llm_request`` spans become children of the cycle that asked for them. Without that flag this module is not imported.
Names follow OpenTelemetry's GenAI conventions, and ``rtap.*`` where they have none. No text of a prompt or an answer,
no message of an error and no key is in a span.
"""

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.types import Cycle
from rtap_server.engine.output_writer import Call
from rtap_server.http.request_log import Outcome, notes_of, outcome
from rtap_server.http.route_kinds import RECURSIVE_PATHS

_TRACE_HEADERS = (b"traceparent", b"tracestate")
_WORKFLOW = "invoke_workflow"
_AGENT = "rtap"
_W3C = TraceContextTextMapPropagator()
_NANOSECONDS = 1_000_000_000
Value = str | int | float | bool


class TracingMiddleware:
    """Around every recursive request: its span, below the client's if it sent one. The span's own ``traceparent`` takes
    the client's place in the headers, where vLLM's routes look for it, and is told in the reply's."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or get_route_path(scope) not in RECURSIVE_PATHS:
            await self._app(scope, receive, send)
            return
        notes = notes_of(scope)
        span = self._tracer.start_span(f"{_WORKFLOW} {_AGENT}", _incoming(scope), SpanKind.INTERNAL)
        span.set_attributes({"gen_ai.operation.name": _WORKFLOW, "gen_ai.agent.name": _AGENT})
        carrier = _outgoing(span)
        own = [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]
        scope["headers"] = [*(h for h in scope["headers"] if h[0] not in _TRACE_HEADERS), *own]
        status: int | None = None

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"traceparent", carrier["traceparent"].encode())]
            await send(message)

        failure: str | None = None
        try:
            await self._app(scope, receive, told)
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            result = outcome(notes.exchange)
            if result is not None:
                span.set_attributes(_workflow_attributes(result))
            if status is not None:
                span.set_attribute("http.response.status_code", status)
            failed = failure or (str(status) if status is not None and status >= 500 else None)
            if failed is not None:
                span.set_attribute("error.type", failed)
                span.set_status(Status(StatusCode.ERROR))
            span.end()


class CycleSpans:
    """The cycles of one choice, each from its first token to its verdict. Used in one task at a time."""

    def __init__(self, tracer: Tracer, model: str, choice: int, parent: Mapping[str, str] | None) -> None:
        """parent: trace headers of the request, as vLLM's routes hand them on."""
        self._tracer, self._model, self._choice = tracer, model, choice
        self._context = _W3C.extract(dict(parent or {}), Context())
        self._open: dict[int, tuple[Span, int]] = {}

    def headers(self, index: int) -> dict[str, str]:
        """Trace headers for the engine's part of a cycle, which begins here if it has not begun yet."""
        if index not in self._open:
            began = time.time_ns()
            span = self._tracer.start_span(f"chat {self._model}", self._context, SpanKind.INTERNAL, start_time=began)
            span.set_attributes(
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.request.model": self._model,
                    "rtap.choice": self._choice,
                    "rtap.cycle.index": index,
                }
            )
            self._open[index] = span, began
        return _outgoing(self._open[index][0])

    def judged(self, cycle: Cycle) -> None:
        """A cycle is complete. It may be told later than it was, so its own seconds say when it ended."""
        span, began = self._open.pop(cycle.index)
        span.set_attributes(_cycle_attributes(cycle))
        span.end(began + int(cycle.seconds * _NANOSECONDS))

    def close(self) -> None:
        """Cycles that nobody waits for any more: begun ahead of a verdict, or left by the client."""
        for span, _ in self._open.values():
            span.set_attribute("rtap.cycle.discarded", True)
            span.end()
        self._open.clear()


class Tracing:
    """Makes the spans of one server. model: its name where a request gives none."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self.tracer, self._model = tracer, model

    def cycles(self, call: Call, choice: int) -> CycleSpans:
        """For one choice of one call; its own among all choices of the request."""
        model = call.exchange.model or self._model
        return CycleSpans(self.tracer, model, call.first_choice + choice, call.options.get("trace_headers"))


def _incoming(scope: Scope) -> Context:
    found = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_HEADERS}
    return _W3C.extract(found, Context())


def _outgoing(span: Span) -> dict[str, str]:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, Context()))
    return carrier


def _workflow_attributes(result: Outcome) -> dict[str, Value]:
    values: dict[str, Value | None] = {
        "gen_ai.request.model": result.model,
        "gen_ai.request.choice.count": result.choices,
        "gen_ai.usage.input_tokens": result.prompt_tokens,
        "gen_ai.usage.output_tokens": result.tokens,
        "gen_ai.usage.reasoning.output_tokens": result.reasoning_tokens,
        "rtap.policy": result.policy,
        "rtap.stop_reason": result.stop_reason,
        "rtap.num_cycles": result.cycles,
        "rtap.confidence": result.confidence,
        "rtap.selected_cycle": result.selected_cycle,
        "rtap.first_answer_seconds": result.first_answer_seconds,
        "rtap.oops_tokens": result.oops_tokens,
        "rtap.discarded_tokens": result.discarded_tokens,
        "rtap.degraded": result.degraded,
    }
    return _known(values)


def _cycle_attributes(cycle: Cycle) -> dict[str, Value]:
    values: dict[str, Value | None] = {
        "gen_ai.usage.input_tokens": cycle.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": cycle.cached_tokens,
        "gen_ai.usage.output_tokens": cycle.tokens,
        "rtap.cycle.confidence": cycle.confidence,
        "rtap.cycle.confidence_seconds": cycle.confidence_seconds,
        "rtap.cycle.answered": cycle.answer is not None,
        "rtap.cycle.oops_tokens": cycle.oops_tokens,
    }
    return _known(values)


def _known(values: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}
