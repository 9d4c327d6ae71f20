"""Isolated engine processes, over a stand-in for the server; tests/e2e/test_start_and_stop.py has the real one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

SERVER = """
import multiprocessing, signal, subprocess, sys, time
from rtap_server.engine.engine_process import isolate

def engine():
    isolate()
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    print("worker", worker.pid, flush=True)
    while True:
        pass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: print("signalled", 0, flush=True))
    process = multiprocessing.get_context(sys.argv[1]).Process(target=engine)
    process.start()
    print("engine", process.pid, flush=True)
    while True:
        time.sleep(1)
"""


@contextmanager
def started(method: str, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """The stand-in, which starts one engine with a worker; and the processes under it."""
    (folder / "server.py").write_text(SERVER, "utf-8")
    server = subprocess.Popen(
        [sys.executable, str(folder / "server.py"), method], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert server.stdout is not None
    started = dict(server.stdout.readline().split() for _ in range(2))
    processes = psutil.Process(server.pid).children(recursive=True)
    assert {int(started["engine"]), int(started["worker"])} <= {process.pid for process in processes}
    try:
        yield server, processes
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_engines_and_their_processes_end_with_a_killed_server(method, tmp_path):
    with started(method, tmp_path) as (server, processes):
        server.kill()
        server.wait()
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_to_the_process_group_reaches_the_server_only(tmp_path):
    with started("spawn", tmp_path) as (server, processes):
        assert server.stdout is not None
        os.killpg(server.pid, signal.SIGINT)
        assert server.stdout.readline() == "signalled 0\n"
        time.sleep(0.2)
        assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
