"""Engines that die or hang under requests, and the drain on signals: real processes, real signals."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import Running, free_port, rtap_command, running

LONG = {
    "model": "rtap",
    "messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}],
    "ignore_eos": True,
    "rtap": {"threshold": 1.0, "max_cycles": 16},
}
SHORT = LONG | {"ignore_eos": False, "max_tokens": 200, "n": 4, "rtap": {"max_cycles": 1}}


def stream(url: str, body: dict, begun: threading.Event | None = None) -> tuple[list[dict], bool]:
    """(events of a stream, whether it ended with [DONE])."""
    events, done = [], False
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                if begun is not None and len(events) > 3:
                    begun.set()
            done = done or line == "data: [DONE]"
    return events, done


def running_engines(server: Running) -> list[psutil.Process]:
    """Its engine processes, including one that is starting."""
    found = list[psutil.Process]()
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if re.search("EngineCore|spawn_main", " ".join(child.cmdline())):
                found.append(child)
    return found


def engines(server: Running) -> dict[str, psutil.Process]:
    """The two engine processes by name: the policy's KV cache is the larger one."""
    found = running_engines(server)
    assert len(found) == 2, [c.cmdline() for c in found]
    policy, generator = sorted(found, key=lambda c: -c.memory_info().vms)
    return {"policy": policy, "confidence": generator}


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def until(condition: Callable[[], bool], seconds: float, server: Running) -> None:
    """Wait for ``condition``; fail with the server's log."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, server.log.read_text()[-3000:]
        time.sleep(0.02)


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[Running]:
    """A server for tests that end it."""
    port = free_port()
    with running(rtap_command(port, *flags), port, "/ready", folder) as started:
        yield started


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server whose generator is killed, and which is stopped afterwards, by the first two tests."""
    flags = ("--confidence-timeout-seconds", "2", "--drain-seconds", "0.3")
    with served(tmp_path_factory.mktemp("mortal"), *flags) as started:
        yield started


def restarts_generator(server: Running) -> None:
    """Requests continue while the generator is away, and are scored again afterwards."""

    def ask() -> dict:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=SHORT, timeout=30).json()
        assert any(choice["message"]["content"] for choice in reply["choices"])  # a sample may end in its thought
        return reply["rtap"]

    assert ask()["degraded"] in ("error", "timeout", "restarting")
    assert httpx.get(f"{server.url}/ready").status_code == 200
    until(lambda: "degraded" not in ask(), 150, server)
    assert server.metrics()["rtap_engine_restarts_total{engine=confidence}"] == 1
    assert server.metrics()["rtap_engine_up{engine=confidence}"] == 1


def test_a_dead_generator_is_restarted(mortal):
    engines(mortal)["confidence"].kill()
    restarts_generator(mortal)


def test_a_drain_returns_the_best_answers_at_its_deadline(mortal):
    children = psutil.Process(mortal.process.pid).children(recursive=True)
    assert children
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(stream, mortal.url, LONG | {"n": 16}, begun)
        assert begun.wait(30)
        whole = pool.submit(httpx.post, f"{mortal.url}/v1/chat/completions", json=LONG | {"n": 16}, timeout=60)
        until(lambda: mortal.metrics()["rtap_trajectories"] == 32, 10, mortal)
        cycles = mortal.metrics()["vllm:request_success_total"]
        until(lambda: mortal.metrics()["vllm:request_success_total"] > cycles + 32, 20, mortal)  # there are answers
        os.killpg(mortal.process.pid, signal.SIGINT)  # as Ctrl-C does
        began = time.monotonic()
        (events, done), reply = streamed.result(30), whole.result(30)
        assert time.monotonic() - began < 3
    assert done
    assert reply.status_code == 200
    for choices in (events[-1]["rtap_choices"], [choice["rtap"] for choice in reply.json()["choices"]]):
        assert [rtap["stop_reason"] for rtap in choices] == ["drained"] * 16
    assert any(choice["message"]["content"] for choice in reply.json()["choices"])
    assert mortal.process.wait(15) == 0
    until(lambda: gone(children), 10, mortal)


@pytest.mark.slow
def test_a_silent_generator_is_restarted_and_a_dead_policy_ends_the_server(tmp_path):
    """The generator stops before its first score. The server's end does not wait for one that is still starting."""
    with served(tmp_path, "--confidence-timeout-seconds", "2", "--engine-silence-seconds", "5") as server:
        engines(server)["confidence"].send_signal(signal.SIGSTOP)
        restarts_generator(server)
        processes = engines(server)
        processes["confidence"].kill()
        until(lambda: gone([processes["confidence"]]) and len(running_engines(server)) == 2, 30, server)
        ends_with(server, processes["policy"], signal.SIGKILL, "has died")


@pytest.mark.slow
def test_requests_do_not_wait_one_by_one_for_a_silent_generator(tmp_path):
    with served(tmp_path, "--confidence-timeout-seconds", "3") as server:

        def ask(_: int) -> tuple[bool, str]:
            began = time.monotonic()
            rtap = httpx.post(f"{server.url}/v1/chat/completions", json=SHORT | {"n": 1}, timeout=30).json()["rtap"]
            return time.monotonic() - began > 3, rtap["degraded"]

        engines(server)["confidence"].send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == [(True, "timeout")] * 8
            assert sorted(pool.map(ask, range(8))) == [(False, "timeout")] * 7 + [(True, "timeout")]


@pytest.mark.slow
def test_a_full_disk_under_the_log_stops_neither_requests_nor_a_restart(tmp_path):
    port = free_port()
    command = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", *rtap_command(port)]
    with running(command, port, "/ready", tmp_path, VLLM_LOGGING_LEVEL="INFO") as server:
        engines(server)["confidence"].kill()
        restarts_generator(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_a_killed_server_takes_the_engines_along(tmp_path):
    with served(tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.process.wait()
        until(lambda: gone(children), 10, server)


@pytest.mark.slow
def test_a_paused_machine_kills_no_engine_and_a_silent_policy_ends_the_server(tmp_path):
    with served(tmp_path, "--engine-silence-seconds", "5") as server:
        before, begun = running_engines(server), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            streaming = pool.submit(stream, server.url, LONG | {"n": 16}, begun)
            assert begun.wait(30)
            processes = [psutil.Process(server.process.pid), *before]
            for process in processes:
                process.suspend()
            time.sleep(8)
            for process in reversed(processes):
                process.resume()
            events, done = streaming.result(60)
        assert done
        assert "error" not in events[-1]
        assert running_engines(server) == before
        ends_with(server, engines(server)["policy"], signal.SIGSTOP, "sent no output")


def ends_with(server: Running, policy: psutil.Process, sent: signal.Signals, problem: str) -> None:
    """Streams end with an error, all processes end, and the log names the problem."""
    begun, others = threading.Event(), running_engines(server)
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(stream, server.url, LONG | {"n": 16}, begun)
        assert begun.wait(30)
        policy.send_signal(sent)
        events, _ = streaming.result(60)
    assert "error" in events[-1], events[-1]
    assert server.process.wait(15) == 1
    assert gone(others)
    assert problem in server.log.read_text()


@pytest.mark.slow
def test_a_drain_finishes_what_it_can_and_a_second_signal_ends_everything(tmp_path):
    with served(tmp_path, "--drain-seconds", "600") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        begun = threading.Event()
        with ThreadPoolExecutor(5) as pool:
            endless = pool.submit(stream, server.url, LONG | {"n": 16}, begun)
            assert begun.wait(30)
            short = [pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=SHORT) for _ in range(4)]
            until(lambda: server.metrics()["rtap_trajectories"] > 16, 10, server)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5, server)
            assert httpx.get(f"{server.url}/live").status_code == 200
            assert server.metrics()["rtap_draining"] == 1
            refused = httpx.post(f"{server.url}/v1/chat/completions", json=SHORT)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            replies = [one.result(30) for one in short]
            assert {reply.status_code for reply in replies} <= {200, 503}  # some may have come too late
            reasons = {reply.json()["rtap"]["stop_reason"] for reply in replies if reply.status_code == 200}
            assert reasons
            assert reasons <= {"threshold", "max_cycles"}
            if not endless.done():  # a quick machine has finished it as well
                server.process.send_signal(signal.SIGTERM)
                assert server.process.wait(3) == 128 + signal.SIGTERM
                with pytest.raises(httpx.HTTPError):
                    endless.result(10)
        until(lambda: gone(children), 10, server)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": LONG["messages"], "n": 2}),
        ("/v1/completions", {"prompt": "3+4", "n": 2, "logprobs": 1}),
        ("/v1/messages", {"messages": LONG["messages"], "max_tokens": 99}),
        ("/v1/responses", {"input": "3+4"}),
    ],
)
def test_a_stream_that_is_cut_before_its_first_token_has_a_final_chunk(server, path, asked):
    """vLLM would stream nothing for an output without text and tokens, not even its end."""
    body = {"model": "rtap", "stream": True, "rtap": {"deadline_seconds": 0.0001}, **asked}
    reply = httpx.post(server.url + path, json=body, timeout=30)
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    objects = [event.get("response", event).get("rtap") for event in events]
    ends = [rtap["stop_reason"] for rtap in objects if rtap and "stop_reason" in rtap]
    assert ends == ["deadline"]
    reasons = [choice["finish_reason"] for event in events for choice in event.get("choices", ())]
    assert reasons.count("length") == asked.get("n", 0)
    assert "\\u001e" not in reply.text


def test_a_deadline_is_exceeded_by_less_than_an_engine_step(server):
    """Alone and among 16 others, streamed and whole; the best answer so far is returned, and the engine is free."""
    body = LONG | {"rtap": {"threshold": 1.0, "max_cycles": 16, "deadline_seconds": 0.5}}

    def late(is_streamed: bool) -> dict:
        if is_streamed:
            return stream(server.url, body)[0][-1]["rtap"]
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()["rtap"]

    before = server.metrics()
    with ThreadPoolExecutor(16) as pool:
        results = [late(False), late(True), *pool.map(late, [n % 2 == 0 for n in range(16)])]
    after = server.metrics()
    assert {rtap["stop_reason"] for rtap in results} <= {"deadline", "max_cycles", "max_tokens"}
    assert sum(rtap["stop_reason"] == "deadline" for rtap in results) > 8
    # Trajectory time: connections and prompts on a busy machine do not count.
    took = [
        after[f"rtap_request_seconds_{name}"] - before.get(f"rtap_request_seconds_{name}", 0)
        for name in ("sum", "count")
    ]
    assert took[1] == len(results)
    assert took[0] / took[1] < 0.6
    over = [after.get(key, 0) - before.get(key, 0) for key in ("rtap_request_seconds_bucket{le=1.0}",)]
    assert over == [len(results)]
    until = time.monotonic() + 1
    while server.metrics()["vllm:num_requests_running"]:
        assert time.monotonic() < until
