"""Run the app under uvicorn until a signal or a failure, with a graceful shutdown.

vLLM's own launcher stops its engine at the first signal, while requests are running.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
from argparse import Namespace
from types import FrameType, SimpleNamespace
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from vllm import envs
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config  # pyright: ignore[reportUnknownVariableType]
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

from rtap_server.engine.server_state import Drain
from rtap_server.engine.supervisor import Supervisor, kill, process_tree
from rtap_server.http.admission import Admission

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FLUSH_SECONDS = 5  # for the last bytes of responses after the drain
_POLL_SECONDS = 0.05
# Python's defaults of 700 and 10 scan the objects of running requests again and again, 5 % of a busy server's time.
_GC_THRESHOLDS = (5_000, 5, 5)
# The side that closes an idle connection first loses the request on its way. vLLM's 5 s equals the timeout of httpx and
# the OpenAI SDK; aiohttp has 15 s, load balancers 60 s.
_KEEP_ALIVE_SECONDS = 75


class _Server(NoSignalServer):
    """vLLM's uvicorn server with tuned garbage collection."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # vLLM has frozen the objects of start-up. Without this collection Python would count them as old objects and
        # postpone full collections until as many new ones exist.
        gc.collect()
        gc.set_threshold(*_GC_THRESHOLDS)


async def serve_app(
    app: FastAPI,
    args: Namespace,
    sock: socket.socket,
    *,
    drain: Drain,
    drain_seconds: float,
    admission: Admission,
    supervisor: Supervisor,
) -> str | None:
    """Serve until a signal or a failure, then drain. Returns why the server failed, None after a signal.

    Raises exceptions of the web server and the supervisor, after the drain."""
    server = _Server(_config(app, args))
    # vLLM's error handlers end this "server" when the engine is dead. The real one ends after the drain.
    app.state.server = SimpleNamespace(should_exit=False)
    refresher = _ssl_refresher(args, server.config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stop, supervising = asyncio.Event(), asyncio.create_task(supervisor.run())
    _set_on_signals(stop)
    waits = [asyncio.create_task(event.wait()) for event in (stop, supervisor.failed)]
    try:
        await asyncio.wait([serving, supervising, *waits], return_when=asyncio.FIRST_COMPLETED)
        is_stopped = stop.is_set() and supervisor.failure is None  # a later signal does not hide a failure
        drain.begin()
        if not supervisor.failed.is_set() and not await _all_answered(admission, drain_seconds):
            drain.end()
        await _all_answered(admission, _FLUSH_SECONDS)  # a dead engine answers its requests with errors
    finally:
        server.should_exit = True
        for task in (*waits, supervising):
            task.cancel()
        await asyncio.gather(serving, supervising, *waits, return_exceptions=True)
        if refresher is not None:
            refresher.stop()
    for task in (serving, supervising):
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return None if is_stopped else supervisor.failure or "the web server stopped unexpectedly"


async def _all_answered(admission: Admission, seconds: float) -> bool:
    """Wait up to ``seconds`` until no request is in flight; False when some still are."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while admission.requests_in_flight:
        if loop.time() >= until:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


def _set_on_signals(stop: asyncio.Event) -> None:
    """Set ``stop`` at the first signal; exit at the second."""
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        if stop.is_set():
            exit_now(number, None)
        stop.set()

    for number in _handled_signals():
        loop.add_signal_handler(number, handle, number)


def exit_now(number: int, _: FrameType | None) -> None:
    """Kill the engine processes and exit with 128 + the signal's number."""
    children = [pid for child in multiprocessing.active_children() if (pid := child.pid) is not None]
    kill(reversed(process_tree(children)))
    os._exit(128 + number)


def exit_on_signals() -> None:
    """Exit at the first signal, while engines are loading and no request is in flight."""
    for number in _handled_signals():
        signal.signal(number, exit_now)


def _handled_signals() -> list[signal.Signals]:
    """The signals that stop the server. Under ``nohup`` SIGHUP stays ignored."""
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in _SIGNALS if not (is_nohup and number is signal.SIGHUP)]


def _keep_alive_seconds() -> int:
    """Lifetime of an idle connection: vLLM's variable if it is set, else longer than common clients keep one."""
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    return envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE if envs.is_set(name) else _KEEP_ALIVE_SECONDS


def _config(app: FastAPI, args: Namespace) -> uvicorn.Config:
    """uvicorn's configuration from vLLM's flags."""
    log_config = cast(dict[str, Any] | None, get_uvicorn_log_config(args))
    options: dict[str, Any] = {} if log_config is None else {"log_config": log_config}
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=_keep_alive_seconds(),
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        http="h11",  # httptools, the faster parser, bounds neither the size nor the number of headers
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        **options,
    )
    config.load()
    return config


def _ssl_refresher(args: Namespace, config: uvicorn.Config) -> SSLCertRefresher | None:
    if not args.enable_ssl_refresh or config.ssl is None:
        return None
    return SSLCertRefresher(
        ssl_context=config.ssl,
        key_path=args.ssl_keyfile,
        cert_path=args.ssl_certfile,
        ca_path=args.ssl_ca_certs,
    )
