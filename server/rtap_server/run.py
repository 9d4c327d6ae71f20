"""Run the app until it is told to stop or cannot go on: uvicorn, signals, the drain.

vLLM's own launcher stops its engine at the first signal, under the requests that it is answering; that is why it is not
used here. The rest of what it does is below.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
from argparse import Namespace
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from vllm import envs
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config  # pyright: ignore[reportUnknownVariableType]
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

from rtap_server.engine.drain import Drain
from rtap_server.engine.supervisor import Supervisor, kill
from rtap_server.engine.vitals import family
from rtap_server.http.admission import Admission

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_SECONDS = 5  # to write the last bytes of what was answered at the end
_LOOK_SECONDS = 0.05
# New objects between two looks for garbage among them, and looks between two at older ones. With Python's 700 and 10 a
# busy server looks at what its requests have in use again and again: 5 % of its time. Here the oldest are looked at
# once in 215,000 objects that stay, some 40 MiB.
_GC_THRESHOLDS = (5_000, 5, 5)
# Whoever closes an idle connection first loses the request that is on its way. vLLM's 5 s are those of httpx and the
# OpenAI SDK; aiohttp has 15, load balancers 60.
_KEEP_ALIVE_SECONDS = 75


class _Server(NoSignalServer):
    """vLLM's own web server, whose process collects garbage in time."""

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # vLLM has frozen what there is by now. Python collects what is older when that has grown by a quarter since the
        # last time, and that was with all of it: circles of a hundred thousand objects would wait. Now it is with none.
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
    """Serve until a signal and the drain after it are over. Result: why the server could not go on, else None.

    Raises what the web server or the supervisor raised, after the drain."""
    server = _Server(_config(app, args))
    app.state.server = server  # vLLM's error handlers end it when the engine is dead
    refresher = _ssl_refresher(args, server.config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    told, watching = asyncio.Event(), asyncio.create_task(supervisor.run())
    _on_signals(told)
    waits = [asyncio.create_task(event.wait()) for event in (told, supervisor.failed)]
    try:
        await asyncio.wait([serving, watching, *waits], return_when=asyncio.FIRST_COMPLETED)
        drain.begin()
        if not supervisor.failed.is_set() and not await _emptied(admission, drain_seconds):
            drain.end()
        await _emptied(admission, _LAST_WORDS_SECONDS)  # a dead engine answers all that it was asked with errors
    finally:
        server.should_exit = True
        for task in (*waits, watching):
            task.cancel()
        await asyncio.gather(serving, watching, *waits, return_exceptions=True)
        if refresher is not None:
            refresher.stop()
    for task in (serving, watching):
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    return None if told.is_set() else supervisor.failure or "the web server stopped by itself"


async def _emptied(admission: Admission, seconds: float) -> bool:
    """Whether all requests were answered within ``seconds``."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while admission.requests_in_flight:
        if loop.time() >= until:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


def _on_signals(told: asyncio.Event) -> None:
    """The first signal begins the drain, the second ends everything."""
    loop = asyncio.get_running_loop()

    def heed(number: int) -> None:
        if told.is_set():
            leave_now(number, None)
        told.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, heed, number)


def leave_now(number: int, _: FrameType | None) -> None:
    """End this process and those of its engines without waiting for anything."""
    engines = [pid for child in multiprocessing.active_children() if (pid := child.pid) is not None]
    kill(reversed(family(engines)))
    os._exit(128 + number)


def on_signals_leave() -> None:
    """While engines are loading and nobody is served: a signal ends everything."""
    for number in _SIGNALS:
        signal.signal(number, leave_now)


def _keep_alive_seconds() -> int:
    """How long an idle connection stays open: vLLM's variable where it is set, else longer than any client's."""
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    return envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE if envs.is_set(name) else _KEEP_ALIVE_SECONDS


def _config(app: FastAPI, args: Namespace) -> uvicorn.Config:
    """What vLLM's flags say of the web server."""
    log_config = cast(dict[str, Any] | None, get_uvicorn_log_config(args))
    options: dict[str, Any] = {} if log_config is None else {"log_config": log_config}
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=_keep_alive_seconds(),
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        http="h11",
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
