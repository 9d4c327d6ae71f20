"""HTTP server with prepared answers, such as a failure followed by a success."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CYCLE = {
    "index": 0, "answer": "4", "confidence": 0.9, "accepted": True, "tokens": 7, "oops_tokens": 0, "prompt_tokens": 5,
    "cached_tokens": 0, "seconds": 0.1, "confidence_seconds": 0.01,
}  # fmt: skip
RTAP = {
    "policy": "confidence", "stop_reason": "threshold", "cycles": [CYCLE], "confidence": 0.9,
    "first_answer_seconds": 0.1, "confidence_tokens": 12, "discarded_tokens": 0,
}  # fmt: skip
REPLY = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "rtap",
    "choices": [
        {"index": 0, "finish_reason": "stop",
         "message": {"role": "assistant", "content": "4", "reasoning": "2+2", "reasoning_content": "2+2"}}
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    "rtap": RTAP,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One prepared answer."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fake:
    """Received requests and remaining answers. The last answer repeats."""

    url: str
    answers: list[Answer]
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    def sent(self, header: str) -> list[str | None]:
        return [headers.get(header) for _, headers, _ in self.requests]


def error(status: int, message: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"error": {"message": message, "type": "error", "param": None, "code": status}}, named)


def chunk(delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "rtap",
        "choices": choices,
    } | more


def stream(*chunks: dict[str, Any]) -> Answer:
    text = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    return Answer(200, text, {"content-type": "text/event-stream"})


THOUGHT = chunk({"reasoning": "2+2", "reasoning_content": "2+2"})
CYCLE_END = chunk({}, rtap={"event": "cycle", "cycle": CYCLE})
DRAFTS = [chunk({}, rtap={"event": "draft", "draft": {"index": 0, "text": text}}) for text in ("so ", "4")]
CONTENT = chunk({"content": "4"})
LAST = chunk({}, finish="stop", rtap=RTAP)


@contextmanager
def fake_server(*answers: Answer) -> Iterator[Fake]:
    """Serve on a free port until the block ends."""
    fake = Fake("", list(answers))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.requests.append((self.path, headers, json.loads(body) if body else None))
            answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
            data = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()
            self.send_response(answer.status)
            for name, value in ({"content-type": "application/json"} | answer.headers).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
