"""A receiver of OTLP over HTTP, in this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Receiver:
    """Takes what an OTLP/HTTP exporter sends. bodies: as they came; spans: (attributes and all) as plain values."""

    bodies: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[dict[str, Any]]:
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {a.key: a.value.string_value for a in resource.resource.attributes}.get("service.name")
                found += [_plain(span, service) for scope in resource.scope_spans for span in scope.spans]
        return found

    def of_trace(self, trace: str) -> list[dict[str, Any]]:
        """The spans of one trace, once its request's is there: it ends last, and they come as they end."""
        deadline = time.monotonic() + 20
        while True:
            found = [span for span in self.spans if span["trace"] == trace]
            if any(span["name"] == "invoke_workflow rtap" for span in found):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)


def _plain(span: Any, service: str | None) -> dict[str, Any]:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    return {
        "service": service, "name": span.name, "kind": span.kind, "trace": span.trace_id.hex(),
        "id": span.span_id.hex(), "parent": span.parent_span_id.hex(), "values": values,
        "start": span.start_time_unix_nano, "end": span.end_time_unix_nano, "error": span.status.code == 2,
    }  # fmt: skip


@contextlib.contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    """A receiver, and the address that an exporter is given."""
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield received, f"http://127.0.0.1:{httpd.server_address[1]}/v1/traces"
        httpd.shutdown()
