"""One log line and one span for each request, from the same summary of its trajectories.

Neither contains text of a prompt, thought or answer, a query string or a key; of a path, only the matched route.
"""

import logging
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.types import Trajectory
from rtap_server.engine.request_state import RequestState, current_request
from rtap_server.http.route_kinds import RECURSIVE_PATHS, route_path
from rtap_server.telemetry.logs import REQUESTS
from rtap_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from rtap_server.telemetry.tracing import RequestSpan, Tracing

# Polled every few seconds by monitoring; logged only when the status is not 200.
_PROBES = frozenset({"/live", "/ready", "/health", "/metrics"})
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that did not wait for its response


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """All choices of a request together. Token counts are of generated tokens, except prompt_tokens.

    stop_reason: ``abandoned`` for an unfinished choice; several reasons are joined by commas.
    confidence, selected_cycle, first_answer_seconds: of the first choice.
    """

    model: str | None
    choices: int
    policy: str | None
    stop_reason: str
    cycles: int
    prompt_tokens: int
    tokens: int
    reasoning_tokens: int
    oops_tokens: int
    discarded_tokens: int
    confidence: float | None
    selected_cycle: int | None
    first_answer_seconds: float | None
    degraded: str | None


def summarize(state: RequestState) -> RequestSummary | None:
    """Summary of the finished choices; None for a request that never reached the engine's recursion."""
    if not state.num_choices:
        return None
    finished = [state.trajectories[choice] for choice in sorted(state.trajectories)]
    first = state.trajectories.get(0)
    reasons = {str(t.stop_reason) for t in finished}
    if len(finished) < state.num_choices:
        reasons.add(Metrics.ABANDONED)
    return RequestSummary(
        model=state.model or None,
        choices=state.num_choices,
        policy=str(finished[0].policy) if finished else None,
        stop_reason=",".join(sorted(reasons)),
        cycles=sum(len(t.cycles) for t in finished),
        prompt_tokens=0 if first is None else _prompt_tokens(first),
        tokens=sum(c.tokens for t in finished for c in t.cycles),
        reasoning_tokens=sum(t.reasoning_tokens for t in finished),
        oops_tokens=sum(c.oops_tokens for t in finished for c in t.cycles),
        discarded_tokens=sum(t.discarded_tokens for t in finished),
        confidence=None if first is None else first.confidence,
        selected_cycle=None if first is None else first.selected,
        first_answer_seconds=None if first is None else first.first_answer_seconds,
        degraded=next((t.degraded for t in finished if t.degraded is not None), None),
    )


def _prompt_tokens(trajectory: Trajectory) -> int:
    return trajectory.cycles[0].prompt_tokens if trajectory.cycles else 0


class RequestLogMiddleware:
    """Log a line when a request ends (``--log-format json``) and trace recursive requests (``--otlp-traces-endpoint``).

    The span's ``traceparent`` replaces the client's in the request headers, where vLLM reads it, and is added to the
    response. quiet_routes: routes that are never logged."""

    def __init__(
        self, app: ASGIApp, *, logs: bool, tracing: "Tracing | None" = None, quiet_routes: Collection[str] = ()
    ) -> None:
        self._app, self._logs, self._tracing, self._quiet = app, logs, tracing, frozenset(quiet_routes)
        self._logger = logging.getLogger(REQUESTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, state, status, span = time.perf_counter(), current_request(), None, None
        if self._tracing is not None and scope["method"] == "POST" and route_path(scope) in RECURSIVE_PATHS:
            span = self._tracing.start_request(scope["headers"])
            scope["headers"] = span.headers

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if span is not None:
                    message["headers"] = [*message["headers"], (b"traceparent", span.traceparent)]
            await send(message)

        failure: str | None = None
        try:
            await self._app(scope, receive, send_observed)
        except BaseException as error:
            failure = type(error).__name__
            if isinstance(error, Exception):
                status = 500  # sent, or cut off, by the layers outside
            raise
        finally:
            summary = summarize(state)
            if span is not None:
                _end_span(span, summary, status, failure)
            if self._logs:
                if status is None:
                    status = _CLIENT_CLOSED_REQUEST if failure is None else 500
                self._log(scope, state, summary, status, time.perf_counter() - started)

    def _log(
        self, scope: Scope, state: RequestState, summary: RequestSummary | None, status: int, seconds: float
    ) -> None:
        route = _route(scope)
        if route in self._quiet or (route in _PROBES and status == 200):
            return
        fields: dict[str, Any] = {
            "request_id": state.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if state.key_name is not None:
            fields["key"] = state.key_name
        traceparent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"").split(b"-")
        if len(traceparent) == 4 and traceparent[1].isalnum():
            fields["trace_id"] = traceparent[1].decode()
        if summary is not None:
            fields |= {name: value for name, value in asdict(summary).items() if value is not None}
        self._logger.info("%s %s %d", scope["method"], route, status, extra=fields)


def _end_span(span: "RequestSpan", summary: RequestSummary | None, status: int | None, failure: str | None) -> None:
    attributes: dict[str, Any] = {}
    if summary is not None:
        attributes = {
            "gen_ai.request.model": summary.model,
            "gen_ai.request.choice.count": summary.choices,
            "gen_ai.usage.input_tokens": summary.prompt_tokens,
            "gen_ai.usage.output_tokens": summary.tokens,
            "gen_ai.usage.reasoning.output_tokens": summary.reasoning_tokens,
            "rtap.policy": summary.policy,
            "rtap.stop_reason": summary.stop_reason,
            "rtap.num_cycles": summary.cycles,
            "rtap.confidence": summary.confidence,
            "rtap.selected_cycle": summary.selected_cycle,
            "rtap.first_answer_seconds": summary.first_answer_seconds,
            "rtap.oops_tokens": summary.oops_tokens,
            "rtap.discarded_tokens": summary.discarded_tokens,
            "rtap.degraded": summary.degraded,
        }
    error = failure or (str(status) if status is not None and status >= 500 else None)
    span.end(attributes | {"http.response.status_code": status}, error)


def _route(scope: Scope) -> str:
    """The pattern of the route that matches, because the path itself is the client's text."""
    path = route_path(scope)
    if path in RECURSIVE_PATHS:
        return path
    # Not read from the scope: a layer inside may have copied the scope before the router wrote to it.
    matches = ((route.matches(scope)[0], getattr(route, "path", None)) for route in scope["app"].routes)
    return next((str(pattern) for match, pattern in matches if match is not Match.NONE and pattern), "unknown")
