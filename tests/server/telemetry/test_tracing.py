"""Spans of requests and cycles in an in-memory exporter: their shape, their parents, and that nothing is left open."""

import ast
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Message, Scope
from vllm.sampling_params import RequestOutputKind

import rtap_server
from rtap_core.types import Judged
from rtap_server.engine.confidence.remote import RemoteConfidence
from rtap_server.engine.confidence.yesno import YesNoConfidence
from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.http.request_log import RequestLogMiddleware
from rtap_server.telemetry.tracing import Tracing
from tests.server.engine.test_confidence_yesno import _Engine
from tests.server.engine.test_recursive_engine import DOUBT, WRONG
from tests.server.fake_engine import FakeEngine, all_of, ask, build
from tests.server.http.test_recursion_fields import _trajectory

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # pragma: allowlist secret
PARENT = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
CANARY = "make 82"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider.get_tracer("test"), "served")


def _ids(span: Any) -> tuple[str, str | None]:
    """(its own id, its parent's) of a finished span of the test's trace."""
    assert f"{span.context.trace_id:032x}" == TRACE
    return f"{span.context.span_id:016x}", None if span.parent is None else f"{span.parent.span_id:016x}"


async def test_each_cycle_is_a_span_and_the_engine_is_told_of_it(tracing, exporter):
    llm = FakeEngine([WRONG, DOUBT])
    stream, state = ask(build(llm, tracing=tracing), options={"trace_headers": PARENT, "priority": 2})
    await all_of(stream)
    spans, cycles = exporter.get_finished_spans(), state.trajectories[0].cycles
    assert [s.name for s in spans] == ["chat served", "chat served"]
    assert [s.kind for s in spans] == [SpanKind.INTERNAL] * 2
    assert [_ids(s)[1] for s in spans] == [CLIENT, CLIENT]
    told = [call.options["trace_headers"]["traceparent"] for call in llm.calls]
    assert told == [f"00-{TRACE}-{_ids(s)[0]}-01" for s in spans]
    assert all(call.options["priority"] == 2 for call in llm.calls)
    for span, cycle in zip(spans, cycles, strict=True):
        assert dict(span.attributes or {}) == {
            "gen_ai.operation.name": "chat", "gen_ai.request.model": "served", "rtap.choice": 0,
            "rtap.cycle.index": cycle.index, "rtap.cycle.confidence": cycle.confidence, "rtap.cycle.answered": True,
            "rtap.cycle.confidence_seconds": cycle.confidence_seconds, "rtap.cycle.oops_tokens": cycle.oops_tokens,
            "gen_ai.usage.input_tokens": cycle.prompt_tokens, "gen_ai.usage.output_tokens": cycle.tokens,
            "gen_ai.usage.cache_read.input_tokens": 0,
        }  # fmt: skip
        assert span.end_time - span.start_time == int(cycle.seconds * 1e9)


async def test_a_client_that_leaves_leaves_no_span_open(tracing, exporter):
    stream, _ = ask(
        build(FakeEngine([WRONG, DOUBT]), tracing=tracing),
        output_kind=RequestOutputKind.DELTA,
        options={"trace_headers": PARENT},
    )
    await anext(stream)
    await stream.aclose()
    (span,) = exporter.get_finished_spans()
    assert span.attributes["rtap.cycle.discarded"] is True


async def _through(
    tracing: Tracing, *, headers: dict[str, str], status: int = 200, error: Exception | None = None
) -> tuple[Scope, list[Message]]:
    """A chat request through the middleware: (scope as the app saw it, messages that the client got)."""
    sent = list[Message]()
    begin_request(RequestState(model="served"))
    scope: Scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        state = current_request()
        state.reserve_choices(1)
        state.trajectories[0] = _trajectory()
        if error is not None:
            raise error
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is read here")

    await RequestLogMiddleware(app, logs=False, tracing=tracing)(scope, receive, send)
    return scope, sent


async def test_the_request_is_a_span_below_the_clients_and_stands_in_its_place(tracing, exporter):
    scope, sent = await _through(tracing, headers=PARENT | {"tracestate": "vendor=1", "host": "x"})
    (span,) = exporter.get_finished_spans()
    own, parent = _ids(span)
    assert (span.name, span.kind, parent) == ("invoke_workflow rtap", SpanKind.INTERNAL, CLIENT)
    expected = f"00-{TRACE}-{own}-01".encode()
    assert sorted(scope["headers"]) == [(b"host", b"x"), (b"traceparent", expected), (b"tracestate", b"vendor=1")]
    assert sent[0]["headers"] == [(b"traceparent", expected)]
    done = _trajectory()
    assert span.attributes["rtap.stop_reason"] == done.stop_reason
    assert span.attributes["rtap.num_cycles"] == len(done.cycles)
    assert span.attributes["rtap.confidence"] == done.confidence
    assert span.attributes["gen_ai.usage.output_tokens"] == sum(c.tokens for c in done.cycles)
    assert span.attributes["http.response.status_code"] == 200
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("header", ["", "00-zz-1-01", f"00-{'0' * 32}-{CLIENT}-01", "x" * 10_000])
async def test_a_broken_traceparent_begins_a_new_trace(tracing, exporter, header):
    await _through(tracing, headers={"traceparent": header})
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


@pytest.mark.parametrize(
    ("status", "error", "told"), [(503, None, "503"), (400, None, None), (200, ValueError(CANARY), "ValueError")]
)
async def test_a_failed_request_is_an_error_without_its_message(tracing, exporter, status, error, told):
    if error is None:
        await _through(tracing, headers={}, status=status)
    else:
        with pytest.raises(ValueError, match=CANARY):
            await _through(tracing, headers={}, error=error)
    (span,) = exporter.get_finished_spans()
    assert span.attributes.get("error.type") == told
    assert (span.status.status_code is StatusCode.ERROR) == (told is not None)
    assert CANARY not in span.to_json()


async def test_what_does_not_recurse_has_no_span(tracing, exporter):
    seen = list[Scope]()

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope: Scope = {"type": "http", "method": "GET", "path": "/v1/models", "root_path": "", "headers": []}
    await RequestLogMiddleware(app, logs=False, tracing=tracing)(scope, None, None)  # type: ignore[arg-type]
    assert seen == [scope]
    assert not exporter.get_finished_spans()


def test_a_server_without_traces_does_not_import_this_module():
    """Nor OpenTelemetry for it: whoever needs it imports it where the flag was seen, or for its types alone."""
    for path in Path(rtap_server.__path__[0]).rglob("*.py"):
        if path.name != "tracing.py":
            top = ast.parse(path.read_text("utf-8"))
            imported = [ast.unparse(node) for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not [
                line for line in imported if "rtap_server.telemetry.tracing" in line or "opentelemetry" in line
            ], path


async def test_a_generator_elsewhere_and_the_policy_as_judge_are_told_of_the_trace():
    heard = list[str | None]()

    def classify(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers.get("traceparent"))
        return httpx.Response(200, json={"data": [{"probs": [0.9]}]})

    class Judge(_Engine):
        async def generate(self, prompt: Any, params: Any, request_id: str, **options: Any):
            heard.append(options["trace_headers"]["traceparent"])
            async for output in super().generate(prompt, params, request_id):
                yield output

    async with httpx.AsyncClient(transport=httpx.MockTransport(classify)) as client:
        for scorer in (
            RemoteConfidence("http://generator", 1.0, client, 1000),
            YesNoConfidence(Judge({1: -0.1, 2: -2.0}, room=1000), [7], 1, 2, 1.0),  # type: ignore[arg-type]
        ):
            engine = build(FakeEngine([WRONG]), confidence=scorer)
            await all_of(ask(engine, rtap={"max_cycles": 1}, options={"trace_headers": PARENT})[0])
        await RemoteConfidence("http://generator", 1.0, client, 1000).score(Judged([1], [2], [1]))  # by /v1/rtap/score
    assert heard == [PARENT["traceparent"], PARENT["traceparent"], None]
