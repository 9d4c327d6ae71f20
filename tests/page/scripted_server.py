"""A server for the page's tests: the page's real files, and streams, refusals and states that a test writes.

Events are built by the real ``rtap_server.http.schema``, so that what the page reads here has the shape it has there.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from rtap_core.types import Cycle, Policy, StopReason, Trajectory
from rtap_server.http.schema import cycle_object, trajectory_object
from rtap_server.routes.page import page_router

CONFIG: dict[str, Any] = {
    "object": "rtap.config", "version": "0.1.0", "models": ["rtap"], "format": "rtap",
    "defaults": {"policy": "confidence", "threshold": 0.76, "max_cycles": 8, "samples": 8, "select": "best",
                 "patience": None, "deadline_seconds": None},
    "limits": {"max_cycles": 16, "samples": 32, "deadline_seconds": 600.0, "body_bytes": 8388608},
    "confidence": {"kind": "pooling", "timeout_seconds": 10.0, "calibration": {"reference": []}},
}  # fmt: skip
HEAD = {"id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 1, "model": "rtap"}
Script = Sequence[dict[str, Any] | float | bytes]
"""What a stream sends, in order: an event, seconds of silence, or bytes as they are."""


def cycle(index: int, think: str, answer: str | None, confidence: float | None, *, accepted: bool = False) -> Cycle:
    """A cycle of a token for about every second sign."""
    tokens = len(think) // 2 + len(answer or "") + 4
    return Cycle(
        index=index, think=think, answer=answer, confidence=confidence, accepted=accepted, tokens=tokens,
        answer_tokens=len(answer or "") + 2, oops_tokens=0, prompt_tokens=20, cached_tokens=0, seconds=0.17,
        confidence_seconds=None if confidence is None else 0.01, confidence_tokens=61,
    )  # fmt: skip


MENDED = [
    cycle(0, "25+7=32 32*3=96", "(25+7)*3", 0.004),
    cycle(1, "That was wrong. 25*3=75 75+7=82", "25*3+7", 0.928, accepted=True),
]
"""A wrong first answer and a right second one."""


def chunk(delta: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """One chunk of a stream."""
    twice = {"reasoning_content": delta["reasoning"]} if delta and "reasoning" in delta else {}
    choices = [] if delta is None else [{"index": 0, "delta": delta | twice, "finish_reason": None}]
    return HEAD | {"choices": choices} | fields


def cycle_event(written: Cycle) -> dict[str, Any]:
    return chunk({}, rtap={"event": "cycle", "cycle": cycle_object(written, with_think=True)})


def draft(index: int, **text: str) -> dict[str, Any]:
    return chunk({}, rtap={"event": "draft", "draft": {"index": index} | text})


def told(cycles: Sequence[Cycle], policy: Policy, stop: StopReason, *, degraded: str | None = None) -> dict[str, Any]:
    """The ``rtap`` object of a finished run."""
    at = next((i for i, c in enumerate(cycles) if c.accepted), None)
    trajectory = Trajectory(
        policy=policy, stop_reason=stop, cycles=tuple(cycles), selected=at, degraded=degraded,
        first_answer_seconds=None if at is None else 0.33, seconds=0.4, finish=None, partial_answer=None,
    )  # fmt: skip
    return trajectory_object(trajectory, with_think=True)


def stream_of(
    cycles: Sequence[Cycle],
    policy: Policy = Policy.CONFIDENCE,
    stop: StopReason = StopReason.THRESHOLD,
    *,
    degraded: str | None = None,
    pause_seconds: float = 0.0,
) -> Script:
    """The whole stream of a run as the server sends it; ``pause_seconds`` after each piece of a thought."""
    sent: list[dict[str, Any] | float | bytes] = [chunk({"role": "assistant", "content": ""})]
    for n, written in enumerate(cycles):
        for part in written.think.split(" "):
            sent += [chunk({"reasoning": part + " "}), pause_seconds]
        # Which of them is returned where none was good enough is told at the end.
        sent.append(cycle_event(replace(written, accepted=written.accepted and stop is not StopReason.MAX_CYCLES)))
        if written.answer is not None and (n < len(cycles) - 1 or not written.accepted):
            sent.append(chunk({"reasoning": f"\n<answer>{written.answer}</answer>\n"}))
    answer = next((c.answer for c in cycles if c.accepted), None)
    sent.append(chunk({} if answer is None else {"content": answer}))
    total = sum(c.tokens for c in cycles)
    thinking = total - (0 if answer is None else len(answer) + 2)
    usage = {"completion_tokens": total, "completion_tokens_details": {"reasoning_tokens": thinking}}
    return [*sent, chunk(None, usage=usage, rtap=told(cycles, policy, stop, degraded=degraded)), b"data: [DONE]\n\n"]


def refusal(status: int, message: str, type_: str, **headers: str) -> Response:
    body = {"error": {"message": message, "type": type_, "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


@dataclass
class ScriptedServer:
    """What a test sets and reads. answers: script or refusal for a request's body. asked: bodies of requests, and their
    headers. left: streams whose client went before their end."""

    url: str = ""
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)
    key: str = ""
    readiness: tuple[int, str] = (200, "ready")
    answers: Callable[[dict[str, Any]], Script | Response] = lambda _: stream_of(MENDED)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0

    def reset(self) -> None:
        """As new, at the same address."""
        self.__init__(self.url)

    async def _play(self, script: Script) -> AsyncGenerator[bytes, None]:
        try:
            for item in script:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item if isinstance(item, bytes) else b"data: " + json.dumps(item).encode() + b"\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router())

        def refused(request: Request) -> Response | None:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "this API key is not known", "authentication_error")
            return None

        @app.get("/ready")
        async def ready() -> Response:
            return JSONResponse({"status": self.readiness[1]}, status_code=self.readiness[0])

        @app.get("/v1/rtap/config")
        async def config(request: Request) -> Response:
            return refused(request) or JSONResponse(self.config)

        @app.post("/v1/rtap/feedback")
        async def feedback(request: Request) -> Response:
            self.judged.append(await request.json())
            return JSONResponse({"verdicts": len(self.judged)})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.asked.append(await request.json())
            self.headers.append(dict(request.headers))
            reply = self.answers(self.asked[-1])
            if isinstance(reply, Response):
                return reply
            return refused(request) or StreamingResponse(self._play(reply), media_type="text/event-stream")

        return app


@contextlib.contextmanager
def scripted_server() -> Generator[ScriptedServer]:
    """A scripted server on a free port, in a thread."""
    scripted = ScriptedServer()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        scripted.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        service = uvicorn.Server(uvicorn.Config(scripted.app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=service.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not service.started:
                time.sleep(0.01)
            yield scripted
        finally:
            service.should_exit = True
            thread.join(10)
