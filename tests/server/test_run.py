"""The web server and what watches over it, without engines: its memory, and that what breaks is no clean stop."""

import asyncio
import gc
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from vllm.utils.gc_utils import freeze_gc_heap

from rtap_server.__main__ import _parse
from rtap_server.engine.server_state import Drain
from rtap_server.engine.supervisor import SupervisedEngine, Supervisor
from rtap_server.http.admission import Admission
from rtap_server.run import _config, serve_app
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


async def test_what_lives_for_a_while_is_collected_though_the_process_is_large(args):
    """vLLM freezes what there is at the start, and Python goes on to measure by that."""

    @asynccontextmanager
    async def freezing(_: FastAPI) -> AsyncGenerator[None]:
        freeze_gc_heap()
        yield

    app, thresholds = FastAPI(lifespan=freezing), gc.get_threshold()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        serving = asyncio.create_task(
            serve_app(
                app, args, sock, drain=Drain(), drain_seconds=1.0, admission=Admission(1),
                supervisor=Watcher(),  # type: ignore[arg-type]
            )
        )  # fmt: skip
        try:
            async with asyncio.timeout(20):
                while not getattr(getattr(app.state, "server", None), "started", False):
                    await asyncio.sleep(0.01)
            before = gc.get_stats()[2]["collections"]
            kept = [[] for _ in range(250_000)]
            assert len(kept) == 250_000
            assert gc.get_stats()[2]["collections"] > before
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            os.kill(os.getpid(), signal.SIGTERM)
        assert await serving is None


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
    app = FastAPI()
    start = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: "
    heads = {b"400": start + b"y" * args.h11_max_incomplete_event_size, b"404": start + b"y\r\n\r\n"}
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        serving = asyncio.create_task(
            serve_app(
                app, args, sock, drain=Drain(), drain_seconds=1.0, admission=Admission(1),
                supervisor=Watcher(),  # type: ignore[arg-type]
            )
        )  # fmt: skip
        try:
            async with asyncio.timeout(20):
                while not getattr(getattr(app.state, "server", None), "started", False):
                    await asyncio.sleep(0.01)
                for status, head in heads.items():
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(head)
                    assert (await reader.readline()).split()[1] == status
                    writer.close()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        assert await serving is None
    assert args.h11_max_incomplete_event_size == 2**16


def test_header_limits_are_applied_as_vllm_applies_them():
    flags = ["--h11-max-incomplete-event-size", "9000", "--h11-max-header-count", "7"]
    config: Any = _config(FastAPI(), _parse([str(MODELS / "policy"), *flags])[0])
    assert config.h11_max_incomplete_event_size == 9000
