"""The supervisor over engines whose process is a real one: a Python that only computes."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from rtap_core.errors import ConfigError
from rtap_server.engine import supervisor as supervisor_module
from rtap_server.engine.supervisor import SilenceTimer, SupervisedEngine, Supervisor
from rtap_server.telemetry.metrics import Metrics


class Engine:
    """The part of an AsyncLLM that the supervisor uses. It sends a message every 20 ms while its process runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.context = zmq.Context()
        manager = SimpleNamespace(processes=[self.process])
        resources = SimpleNamespace(engine_manager=manager, ctx=self.context)
        self.engine_core = SimpleNamespace(resources=resources, get_output_async=self._output)
        self.was_shut_down = False
        self.num_unfinished, self.is_ready = 1, asyncio.Event()
        self.is_ready.set()

    async def _output(self) -> None: ...

    async def send_messages(self) -> None:
        """AsyncLLM's output handler: it reads what the process sends."""
        while True:
            await asyncio.sleep(0.02)
            if self.process.poll() is None and psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
                await self.engine_core.get_output_async()

    @property
    def errored(self) -> bool:
        return self.process.poll() is not None

    async def get_supported_tasks(self) -> tuple[str, ...]:
        await self.is_ready.wait()
        return ("generate",)

    def get_num_unfinished_requests(self) -> int:
        return self.num_unfinished

    def shutdown(self, timeout: float | None = None) -> None:
        self.was_shut_down = True
        self.process.kill()
        self.process.wait()


class Watched:
    """A supervisor over a policy and a generator. loads: what each attempt to start the latter gives."""

    def __init__(self, loads: list[Any]) -> None:
        self.registry, self.announced = CollectorRegistry(), list[str]()
        self.engines, self._loads = [Engine(), Engine()], iter(loads)
        self.policy = SupervisedEngine("policy", self.engines[0])  # type: ignore[arg-type]
        self.generator = SupervisedEngine("confidence", self.engines[1], self._load)  # type: ignore[arg-type]
        self.supervisor = Supervisor([self.policy, self.generator], Metrics(self.registry), 1.5, self.announced.append)

    def _load(self) -> Any:
        given = next(self._loads)
        if isinstance(given, Exception):
            raise given
        self.engines.append(given())
        return self.engines[-1]

    def figure(self, name: str, engine: str) -> float | None:
        return self.registry.get_sample_value(name, {"engine": engine})


@asynccontextmanager
async def watched(*loads: Any) -> AsyncGenerator[Watched]:
    watch = Watched(list(loads))
    task = asyncio.create_task(watch.supervisor.run())
    messages = [asyncio.create_task(engine.send_messages()) for engine in watch.engines]
    await asyncio.sleep(0.1)
    try:
        yield watch
    finally:
        for one in (task, *messages):
            one.cancel()
        await asyncio.gather(task, *messages, return_exceptions=True)
        for engine in watch.engines:
            engine.shutdown()
            engine.context.term()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(supervisor_module, "_RETRY_SECONDS", (0.05, 0.1))


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(("sent", "what"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "sent no output for 1.5 s")])
async def test_the_end_of_the_policy_is_a_failure_of_the_server(sent, what):
    async with watched() as watch:
        assert watch.figure("rtap_engine_up", "policy") == 1
        watch.engines[0].process.send_signal(sent)
        async with asyncio.timeout(20):
            await watch.supervisor.failed.wait()
        assert (watch.supervisor.failure or "").endswith(what)
        assert watch.figure("rtap_engine_up", "policy") == 0
        assert watch.figure("rtap_engine_up", "confidence") == 1
        await until(lambda: watch.engines[0].errored)  # a silent one was killed


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_generator_is_started_again_until_that_works(sent):
    wrapped = ConfigError("could not be loaded")
    wrapped.__cause__ = MemoryError()
    async with watched(RuntimeError("no memory"), wrapped, Engine) as watch:
        watch.engines[1].process.send_signal(sent)
        await until(lambda: watch.generator.engine is None)
        assert watch.figure("rtap_engine_up", "confidence") == 0
        await until(lambda: watch.figure("rtap_engine_up", "confidence") == 1)
        assert watch.generator.engine is watch.engines[2]
        assert watch.engines[1].was_shut_down
        await until(lambda: watch.engines[1].context.closed)
        assert watch.figure("rtap_engine_restarts_total", "confidence") == 1
        assert watch.figure("rtap_engine_restarts_total", "policy") == 0
        assert not watch.supervisor.failed.is_set()
        assert watch.announced[1:] == [
            "the confidence engine failed to start (RuntimeError); next attempt in 0.1 s",
            "the confidence engine failed to start (MemoryError); next attempt in 0.1 s",
            "the confidence engine is running again",
        ]


@pytest.mark.parametrize("is_late", [False, True], ids=["while it loads", "as it is there"])
async def test_who_stops_does_not_wait_for_an_engine_that_is_being_started(is_late: bool):
    begun, started = threading.Event(), list[Engine]()

    def load() -> Engine:
        """Waits for its process, as vLLM does until that is ready; a late one is ready before anybody can kill it."""
        begun.set()
        time.sleep(0.1)
        started.append(Engine())
        if not is_late:
            started[0].process.wait(60)
            raise RuntimeError("the engine's process has died")
        return started[0]

    async with watched(load) as watch:
        watch.engines[1].process.kill()
        await until(begun.is_set)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 5
    assert started[0].errored
    assert started[0].was_shut_down == is_late
    started[0].context.term()


async def test_progress_is_told_as_a_time_of_day():
    async with watched() as watch:
        first = watch.figure("rtap_engine_last_progress_timestamp_seconds", "policy")
        await asyncio.sleep(0.2)
        second = watch.figure("rtap_engine_last_progress_timestamp_seconds", "policy")
        assert first is not None and second is not None  # noqa: PT018 - for the type
        assert second > first > 1.7e9


@given(st.lists(st.tuples(st.floats(0, 10_000), st.booleans(), st.booleans()), max_size=60))
def test_a_pause_counts_no_more_than_one_interval_and_progress_resets_the_timer(steps):
    timer, outputs, observed = SilenceTimer(max_interval_seconds=1.0), 0, 0.0
    for interval, has_output, is_busy in steps:
        outputs += has_output
        timer.observe(interval, num_outputs=outputs, is_busy=is_busy)
        observed = 0.0 if has_output else observed + is_busy * min(interval, 1.0)
        assert timer.silent_seconds == pytest.approx(observed)


def test_a_machine_that_slept_an_hour_does_not_kill_a_busy_engine():
    timer = SilenceTimer(max_interval_seconds=1.0)
    timer.observe(0.5, num_outputs=1, is_busy=True)
    timer.observe(3600.0, num_outputs=1, is_busy=True)
    assert timer.silent_seconds == 1.0


@given(st.lists(st.floats(60, 1e6), max_size=50))
def test_a_paused_observer_never_kills(pauses):
    """The machine sleeps between two observations; the engine answers within the next interval."""
    timer = SilenceTimer(max_interval_seconds=1.0)
    for outputs, pause in enumerate(pauses):
        timer.observe(pause, num_outputs=outputs, is_busy=True)
        assert timer.silent_seconds <= 1.0
        timer.observe(0.5, num_outputs=outputs + 1, is_busy=True)
        assert timer.silent_seconds == 0.0


def test_a_silent_generator_is_found_though_its_requests_time_out_sooner():
    """A score that timed out is aborted, so that the engine has no requests until the next one."""
    timer = SilenceTimer(max_interval_seconds=1.0)
    for _ in range(7):
        for _ in range(20):
            timer.observe(0.5, num_outputs=0, is_busy=True)
        for _ in range(100):
            timer.observe(0.5, num_outputs=0, is_busy=False)
    assert timer.silent_seconds == 70.0


async def test_an_engine_that_is_silent_from_its_start_is_found_though_it_counts_no_request():
    """AsyncLLM registers a request only after get_supported_tasks has been answered once."""

    def silent() -> Engine:
        engine = Engine()
        engine.num_unfinished = 0
        engine.is_ready.clear()
        return engine

    async with watched(silent, Engine) as watch:
        watch.engines[1].process.kill()
        await until(lambda: watch.figure("rtap_engine_restarts_total", "confidence") == 2)
        assert watch.generator.engine is watch.engines[3]
