"""Supervise the engines: notice a dead or silent engine, restart the generator, end the server with the policy.

The policy cannot be replaced under its requests, so its end is that of the process, which an orchestrator restarts.
Requests continue without the generator while it restarts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import psutil
from vllm.v1.engine.async_llm import AsyncLLM

from rtap_server.engine import vllm_compat
from rtap_server.telemetry.metrics import Metrics

_CHECK_SECONDS = 0.5
_RETRY_SECONDS = (1.0, 60.0)  # before a restart: at first, and at most after doubling
Load = Callable[[], AsyncLLM]


class SupervisedEngine:
    """An engine and how to restart it. engine: None while a restart is in progress.

    name: its metric label. load: starts it, blocking; None for an engine that is not restarted. num_outputs: messages
    received from the engine process."""

    def __init__(self, name: str, engine: AsyncLLM, load: Load | None = None) -> None:
        self.name, self.load, self.num_outputs = name, load, 0
        self.engine: AsyncLLM | None = None
        self.use(engine)

    def use(self, engine: AsyncLLM) -> None:
        """Make ``engine`` the running one and count its messages."""
        self.engine = engine
        vllm_compat.on_output(engine, self._count_output)

    def _count_output(self) -> None:
        self.num_outputs += 1


@dataclass(slots=True)
class SilenceTimer:
    """Seconds with unfinished requests since an engine's last message.

    An interval counts at most ``max_interval_seconds``, because a paused machine or a blocked event loop sees no
    messages. Idle time neither counts nor resets: a score that times out is aborted, so a silent generator is idle
    between requests."""

    max_interval_seconds: float
    silent_seconds: float = 0.0
    _num_outputs: int = 0

    def observe(self, interval_seconds: float, *, num_outputs: int, is_busy: bool) -> None:
        """Record one observation, ``interval_seconds`` after the previous one."""
        if num_outputs != self._num_outputs:
            self.silent_seconds = 0.0
        elif is_busy:
            self.silent_seconds += min(interval_seconds, self.max_interval_seconds)
        self._num_outputs = num_outputs


class Supervisor:
    """Watches all engines of a server. failure: why the server cannot continue; ``failed`` is set with it."""

    def __init__(
        self,
        engines: Sequence[SupervisedEngine],
        metrics: Metrics,
        silence_seconds: float,
        announce: Callable[[str], None],
    ) -> None:
        """announce: prints a sentence for the operator."""
        self.failure: str | None = None
        self.failed = asyncio.Event()
        self._engines, self._metrics = engines, metrics
        self._silence_seconds, self._announce = silence_seconds, announce

    async def run(self) -> None:
        """Supervise until cancelled. The caller stops the engines."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self._engines:
                tasks.create_task(self._supervise(engine))

    async def _supervise(self, supervised: SupervisedEngine) -> None:
        while supervised.engine is not None:
            self._metrics.set_engine_up(supervised.name, up=True)
            problem = await self._until_lost(supervised, supervised.engine)
            self._metrics.set_engine_up(supervised.name, up=False)
            if supervised.load is None:
                self.failure = f"the {supervised.name} engine {problem}"
                self.failed.set()
                return
            self._announce(f"the {supervised.name} engine {problem}; requests continue without it while it restarts")
            lost, supervised.engine = supervised.engine, None
            await asyncio.to_thread(lost.shutdown, 0)
            await _close_sockets(lost)
            supervised.use(await self._restart(supervised, supervised.load))
            self._announce(f"the {supervised.name} engine is running again")

    async def _until_lost(self, supervised: SupervisedEngine, engine: AsyncLLM) -> str:
        """Return the problem when the engine is dead or silent. A silent one is killed, so that vLLM fails its
        requests."""
        timer, checked = SilenceTimer(2 * _CHECK_SECONDS), time.monotonic()
        # vLLM counts no request before the engine has answered this call, so a silent new engine would look idle.
        first_call = asyncio.create_task(_call(engine.get_supported_tasks))
        try:
            while True:
                if engine.errored:
                    return "has died"
                now, is_busy = time.monotonic(), not first_call.done() or engine.get_num_unfinished_requests() > 0
                timer.observe(now - checked, num_outputs=supervised.num_outputs, is_busy=is_busy)
                checked = now
                self._metrics.set_engine_progress(supervised.name, time.time() - timer.silent_seconds)
                if timer.silent_seconds > self._silence_seconds:
                    kill(process_tree(vllm_compat.process_ids(engine)))
                    return f"had requests and sent no output for {self._silence_seconds:g} s"
                await asyncio.sleep(_CHECK_SECONDS)
        finally:
            first_call.cancel()

    async def _restart(self, supervised: SupervisedEngine, load: Load) -> AsyncLLM:
        wait, longest = _RETRY_SECONDS
        while True:
            await asyncio.sleep(wait)
            wait = min(2 * wait, longest)
            try:
                engine = await _load_in_thread(load)
            except Exception as error:  # any class; vLLM has logged why, and the next attempt may succeed
                cause = type(error.__cause__ or error).__name__
                self._announce(f"the {supervised.name} engine failed to start ({cause}); next attempt in {wait:g} s")
            else:
                self._metrics.count_restart(supervised.name)
                return engine


async def _call(function: Callable[[], Awaitable[object]]) -> None:
    """Await ``function``. Its failure shows in ``AsyncLLM.errored``."""
    with suppress(Exception):
        await function()


def process_tree(process_ids: Iterable[int]) -> list[psutil.Process]:
    """The processes that exist of ``process_ids`` and all that they started."""
    found = list[psutil.Process]()
    for process_id in process_ids:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process_id)
            found += [parent, *parent.children(recursive=True)]
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill ``processes``, those that have ended excepted."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def _load_in_thread(load: Load) -> AsyncLLM:
    """Run ``load`` in a thread. Cancellation kills the process that it starts: a thread cannot be cancelled, and the
    server's exit would wait for it."""
    others = set(psutil.Process().children())
    loading = asyncio.get_running_loop().run_in_executor(None, load)
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        while not loading.done():  # its process may not exist yet
            kill(process_tree(process.pid for process in set(psutil.Process().children()) - others))
            await asyncio.sleep(_CHECK_SECONDS)
        if loading.exception() is None:
            loading.result().shutdown(0)
        raise


async def _close_sockets(engine: AsyncLLM) -> None:
    """Release the ZeroMQ threads and files of an engine that was shut down."""
    await asyncio.sleep(0)  # shutdown closes the sockets on the event loop
    context = vllm_compat.zmq_context(engine)
    if context is not None:
        Thread(target=context.term, daemon=True).start()  # it may block until the sockets are closed
