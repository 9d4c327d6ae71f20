"""Watch over the engines: what dies or falls silent is noticed within seconds.

The policy cannot be replaced under its requests: its end is that of the process, which an orchestrator starts again.
The generator can: requests go on without it while it is loaded anew.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import psutil
import zmq
from vllm.v1.engine.async_llm import AsyncLLM

from rtap_server.engine.vitals import Verdict, Vitals, family, look
from rtap_server.telemetry.metrics import Metrics

_LOOK_SECONDS = 0.5
_BACK_OFF_SECONDS = (1.0, 60.0)  # between attempts to start an engine: the first, and at most
Load = Callable[[], AsyncLLM]


class Ward:
    """An engine that is watched. name: its metric label. engine: None while there is none.

    load: starts it anew, in a thread; None for one that must not be. Raises whatever vLLM raises."""

    def __init__(self, name: str, engine: AsyncLLM, load: Load | None = None) -> None:
        self.name, self.load = name, load
        self.engine: AsyncLLM | None = engine


class Supervisor:
    """Of all engines of a server. failure: why the server cannot go on; ``failed`` is set with it."""

    def __init__(
        self, wards: Sequence[Ward], metrics: Metrics, silence_seconds: float, tell: Callable[[str], None]
    ) -> None:
        """tell: takes a sentence for whoever runs the server."""
        self.failure: str | None = None
        self.failed = asyncio.Event()
        self._wards, self._metrics, self._silence_seconds, self._tell = wards, metrics, silence_seconds, tell

    async def run(self) -> None:
        """Watch until cancelled; what was started anew is then the wards' to stop."""
        async with asyncio.TaskGroup() as tasks:
            for ward in self._wards:
                tasks.create_task(self._keep(ward))

    async def _keep(self, ward: Ward) -> None:
        while ward.engine is not None:
            self._metrics.engine_up(ward.name, up=True)
            verdict = await self._until_lost(ward, ward.engine)
            self._metrics.engine_up(ward.name, up=False)
            if ward.load is None:
                self.failure = f"the {ward.name} engine is {verdict}"
                self.failed.set()
                return
            self._tell(f"the {ward.name} engine is {verdict}; requests go on without it while it is started again")
            lost, ward.engine = ward.engine, None
            await asyncio.to_thread(lost.shutdown, 0)
            await _release(lost)
            ward.engine = await self._anew(ward, ward.load)
            self._tell(f"the {ward.name} engine is up again")

    async def _until_lost(self, ward: Ward, engine: AsyncLLM) -> Verdict:
        """Returns when the engine is dead; a silent one is killed, so that vLLM tells its requests."""
        processes = _processes(engine)
        vitals = Vitals(self._silence_seconds, time.monotonic())
        while True:
            sign = look(processes, is_alive=not engine.errored, is_busy=engine.get_num_unfinished_requests() > 0)
            verdict = vitals.observe(sign, time.monotonic())
            self._metrics.engine_progress(ward.name, time.time() - (time.monotonic() - vitals.last_progress))
            if verdict is Verdict.SILENT:
                kill(processes)
            if verdict is not Verdict.ALIVE:
                return verdict
            await asyncio.sleep(_LOOK_SECONDS)

    async def _anew(self, ward: Ward, load: Load) -> AsyncLLM:
        wait, longest = _BACK_OFF_SECONDS
        while True:
            await asyncio.sleep(wait)
            wait = min(2 * wait, longest)
            with suppress(Exception):  # vLLM raises what it likes, and says so in its log; the next attempt may do
                engine = await _loaded(load)
                self._metrics.engine_restarted(ward.name)
                return engine


def kill(processes: Iterable[psutil.Process]) -> None:
    """Those that are still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def _loaded(load: Load) -> AsyncLLM:
    """``load`` in a thread. Cancelled, it kills the process that is being started, which ends the load: a thread cannot
    be cancelled, and the end of this process would wait for it."""
    others = set(psutil.Process().children())
    loading = asyncio.get_running_loop().run_in_executor(None, load)
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        while not loading.done():  # its process may not have been started yet
            kill(family(process.pid for process in set(psutil.Process().children()) - others))
            await asyncio.sleep(_LOOK_SECONDS)
        if loading.exception() is None:
            loading.result().shutdown(0)
        raise


async def _release(engine: AsyncLLM) -> None:
    """Give back the threads and files of an engine that was shut down: vLLM leaves those of its ZeroMQ context to the
    end of the process. The end of a context waits for its sockets, so nothing waits for it, the process's end neither.
    """
    await asyncio.sleep(0)  # its sockets are closed by what its shutdown has put on the loop
    context: zmq.Context[Any] | None = getattr(getattr(engine.engine_core, "resources"), "ctx", None)  # noqa: B009
    if context is not None:
        Thread(target=context.term, daemon=True).start()


def _processes(engine: AsyncLLM) -> list[psutil.Process]:
    """Those on this machine; none for engines that are Ray's actors, whose death Ray tells vLLM."""
    manager = getattr(engine.engine_core, "resources").engine_manager  # noqa: B009 - of vLLM's clients with processes
    return family(process.pid for process in getattr(manager, "processes", ()))
