"""OpenTelemetry spans: ``invoke_workflow`` for a request and, inside it, ``chat MODEL`` for each cycle.

Spans go where vLLM sends its own (``--otlp-traces-endpoint``), through the provider that vLLM sets up; vLLM's
``llm_request`` spans are children of the cycle spans. Without that flag this module is not imported. Names follow
OpenTelemetry's GenAI conventions, and ``rtap.*`` where they have none. Spans contain no text and no key.
"""

import time
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from rtap_core.types import Cycle

_TRACE_HEADERS = (b"traceparent", b"tracestate")
_WORKFLOW = "invoke_workflow"
_AGENT = "rtap"
_W3C = TraceContextTextMapPropagator()
_NANOSECONDS = 1_000_000_000
Value = str | int | float | bool
Header = tuple[bytes, bytes]


class Tracing:
    """Factory of the server's spans. model: the model name for requests that give none."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer, self._model = tracer, model

    def start_request(self, headers: Iterable[Header]) -> "RequestSpan":
        """Start the span of one request, a child of the client's span when ``headers`` name one."""
        return RequestSpan(self._tracer, list(headers))

    def start_cycles(self, model: str, choice: int, parent: Mapping[str, str] | None) -> "CycleSpans":
        """Spans for the cycles of one choice. parent: trace headers of the request."""
        return CycleSpans(self._tracer, model or self._model, choice, parent)


class RequestSpan:
    """Span of one request. headers: the request's, with this span as parent. traceparent: of this span."""

    def __init__(self, tracer: Tracer, headers: list[Header]) -> None:
        given = {name.decode(): value.decode("latin-1") for name, value in headers if name in _TRACE_HEADERS}
        self._span = tracer.start_span(f"{_WORKFLOW} {_AGENT}", _W3C.extract(given, Context()), SpanKind.INTERNAL)
        self._span.set_attributes({"gen_ai.operation.name": _WORKFLOW, "gen_ai.agent.name": _AGENT})
        carrier = _carrier(self._span)
        own = [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]
        self.headers = [*(h for h in headers if h[0] not in _TRACE_HEADERS), *own]
        self.traceparent = carrier["traceparent"].encode()

    def end(self, attributes: Mapping[str, Value | None], error: str | None) -> None:
        """End the span. error: exception class or status code of a failed request."""
        self._span.set_attributes(_without_none(attributes))
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class CycleSpans:
    """Spans of the cycles of one choice, each from the start of its generation to its score. One task at a time."""

    def __init__(self, tracer: Tracer, model: str, choice: int, parent: Mapping[str, str] | None) -> None:
        self._tracer, self._model, self._choice = tracer, model, choice
        self._context = _W3C.extract(dict(parent or {}), Context())
        self._open: dict[int, tuple[Span, int]] = {}

    def headers(self, index: int) -> dict[str, str]:
        """Trace headers for the engine request of cycle ``index``; starts its span when it has none."""
        if index not in self._open:
            started = time.time_ns()
            span = self._tracer.start_span(f"chat {self._model}", self._context, SpanKind.INTERNAL, start_time=started)
            span.set_attributes(
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.request.model": self._model,
                    "rtap.choice": self._choice,
                    "rtap.cycle.index": index,
                }
            )
            self._open[index] = span, started
        return _carrier(self._open[index][0])

    def end_cycle(self, cycle: Cycle) -> None:
        """End the span of a finished cycle. It may be reported late, so its own seconds give the end time."""
        span, started = self._open.pop(cycle.index)
        attributes: dict[str, Value | None] = {
            "gen_ai.usage.input_tokens": cycle.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": cycle.cached_tokens,
            "gen_ai.usage.output_tokens": cycle.tokens,
            "rtap.cycle.confidence": cycle.confidence,
            "rtap.cycle.confidence_seconds": cycle.confidence_seconds,
            "rtap.cycle.answered": cycle.answer is not None,
            "rtap.cycle.oops_tokens": cycle.oops_tokens,
        }
        span.set_attributes(_without_none(attributes))
        span.end(started + int(cycle.seconds * _NANOSECONDS))

    def close(self) -> None:
        """End the spans of cycles that were aborted."""
        for span, _ in self._open.values():
            span.set_attribute("rtap.cycle.discarded", True)
            span.end()
        self._open.clear()


def _carrier(span: Span) -> dict[str, str]:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span, Context()))
    return carrier


def _without_none(values: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}
