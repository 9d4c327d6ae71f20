"""The web server and what watches over it, without engines: its memory, and that what breaks is no clean stop."""

import asyncio
import gc
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from vllm.entrypoints.launchers.launcher import terminate_if_errored
from vllm.utils.gc_utils import freeze_gc_heap

from rtap_server.__main__ import _parse
from rtap_server.engine.server_state import Drain
from rtap_server.engine.supervisor import SupervisedEngine, Supervisor
from rtap_server.http.admission import Admission, Demand
from rtap_server.run import _SIGNALS, _config, _handled_signals, serve_app
from rtap_server.telemetry.metrics import Metrics
from tests.other_checkpoints import MODELS


@pytest.fixture(scope="module")
def args() -> Namespace:
    return _parse([str(MODELS / "policy")])[0]


class FakeAsyncLLM:
    """An engine whose state cannot be read."""

    class engine_core:
        async def get_output_async() -> None: ...


class Watcher:
    """A supervisor that sees nothing."""

    failure: str | None = None

    def __init__(self) -> None:
        self.failed = asyncio.Event()

    async def run(self) -> None:
        await self.failed.wait()


class Served:
    """An app behind ``serve_app``. serving: what that returns."""

    def __init__(
        self, serving: "asyncio.Task[str | None]", port: int, supervisor: Watcher, admission: Admission
    ) -> None:
        self.serving, self.port, self.supervisor, self.admission = serving, port, supervisor, admission

    async def status(self, path: str = "/", headers: bytes = b"") -> int:
        """The status of a reply to GET."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%s\r\n" % (path.encode(), headers))
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()


@asynccontextmanager
async def served(app: FastAPI, args: Namespace, *, drain_seconds: float = 1.0) -> AsyncGenerator[Served]:
    """Serve ``app`` until the end of the context, which waits for it."""
    supervisor, admission, thresholds = Watcher(), Admission(1), gc.get_threshold()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = asyncio.create_task(
            serve_app(
                app, args, sock, drain=Drain(), drain_seconds=drain_seconds, admission=admission,
                supervisor=supervisor,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        server = Served(serving, sock.getsockname()[1], supervisor, admission)
        try:
            async with asyncio.timeout(30):
                await server.status()  # it has started
                yield server
                if not serving.done() and not supervisor.failed.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                await serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            gc.set_threshold(*thresholds)
            for number, handler in handlers.items():
                signal.signal(number, handler)


async def test_what_lives_for_a_while_is_collected_though_the_process_is_large(args):
    """vLLM freezes what there is at the start, and Python goes on to measure by that."""

    @asynccontextmanager
    async def freezing(_: FastAPI) -> AsyncGenerator[None]:
        freeze_gc_heap()
        yield

    try:
        async with served(FastAPI(lifespan=freezing), args):
            before = gc.get_stats()[2]["collections"]
            kept = [[] for _ in range(250_000)]
            assert len(kept) == 250_000
            assert gc.get_stats()[2]["collections"] > before
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_lets_the_running_request_finish(args, number):
    app, may_end = FastAPI(), asyncio.Event()

    @app.get("/slow")
    async def _slow() -> None:
        await may_end.wait()

    async with served(app, args, drain_seconds=20) as server:
        with server.admission.admit(Demand()):
            running = asyncio.create_task(server.status("/slow"))
            await asyncio.sleep(0.1)
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.3)
            assert not running.done()
            may_end.set()
            assert await running == 200
        assert await server.serving is None


async def test_a_dead_engine_ends_the_server_by_the_supervisor_and_not_by_vllms_error_handler(args):
    """The handler runs before the supervisor has looked, and other requests are still answered."""
    app = FastAPI()

    @app.get("/fail")
    async def _fail(request: Request) -> None:
        engine: Any = SimpleNamespace(errored=True, is_running=False)
        terminate_if_errored(request.app.state.server, engine)

    async with served(app, args) as server:
        for _ in range(2):
            assert await server.status("/fail") == 200
            await asyncio.sleep(0.3)
        server.supervisor.failure = "the policy engine has died"
        server.supervisor.failed.set()
        assert await server.serving == "the policy engine has died"


@pytest.mark.parametrize("is_ignored", [True, False])
def test_nohup_keeps_sighup_ignored(is_ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        assert (signal.SIGHUP in _handled_signals()) is not is_ignored
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_supervisor_that_breaks_is_told_and_not_swallowed(args):
    drain = Drain()
    unknown = SupervisedEngine("policy", FakeAsyncLLM())  # type: ignore[arg-type] - it lacks all that is read of it
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(ExceptionGroup) as caught:
        await serve_app(
            FastAPI(), args, sock, drain=drain, drain_seconds=1.0, admission=Admission(1),
            supervisor=Supervisor([unknown], Metrics(CollectorRegistry()), 1.0, lambda _: None),
        )  # fmt: skip
    assert caught.group_contains(AttributeError)
    assert drain.has_begun


def test_a_connection_stays_open_for_longer_than_clients_keep_it(args, monkeypatch):
    monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
    longest_seconds = 60  # a load balancer's; aiohttp has 15, httpx 5
    assert _config(FastAPI(), args).timeout_keep_alive > longest_seconds
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "7")
    assert _config(FastAPI(), args).timeout_keep_alive == 7


async def test_a_huge_header_is_refused_and_the_server_lives(args):
    """--h11-max-incomplete-event-size bounds a head that has not ended."""
    assert args.h11_max_incomplete_event_size == 2**16
    async with served(FastAPI(), args) as server:
        assert await server.status(headers=b"x: " + b"y" * 8 * args.h11_max_incomplete_event_size + b"\r\n") == 400
        assert await server.status(headers=b"x: y\r\n") == 404
