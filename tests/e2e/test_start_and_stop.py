"""Start-up time, memory and errors; signals while loading. Signals while serving: test_faults.py."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e.conftest import ENVIRONMENT, ROOT, START_SECONDS, free_port, rtap_command
from tests.e2e.test_faults import gone


def test_ready_in_time_and_within_memory(server):
    assert server.start_seconds < 90
    process = psutil.Process(server.process.pid)
    resident = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
    assert resident < 6 * 2**30


def test_a_model_that_cannot_be_served_is_one_sentence():
    """Other configuration errors: tests/server."""
    done = subprocess.run(
        [sys.executable, "-m", "rtap_server", "/nowhere/model"], capture_output=True, text=True, timeout=180, cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("rtap serve: ")]
    assert sentences[-1] == (
        "rtap serve: no model at /nowhere/model: give a folder with a config.json, or a Hugging Face name"
    )


@pytest.mark.slow
def test_too_little_memory_ends_in_one_sentence():
    flags = ("--confidence", "none", "--kv-cache-memory-bytes", str(10**14))
    done = subprocess.run(
        rtap_command(free_port(), *flags), capture_output=True, text=True, timeout=180, cwd=ROOT,
        env={**os.environ, **ENVIRONMENT}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert (
        "Decrease --kv-cache-memory-bytes" in done.stderr + done.stdout
    )  # vLLM's own message, from the engine's process
    last = done.stderr.splitlines()[-1]
    assert "could not be loaded: the last error above has the cause; run `rtap doctor " in last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_while_loading_takes_the_engines_along(number):
    with subprocess.Popen(
        rtap_command(free_port()), cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            parent, began = psutil.Process(process.pid), time.monotonic()
            while len(children := parent.children(recursive=True)) < 3:  # both engines and multiprocessing's own helper
                assert time.monotonic() - began < START_SECONDS
                time.sleep(0.1)
            process.send_signal(number)
            assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
        finally:
            process.kill()
    # A killed server cannot kill its engines: they notice once they have imported vLLM.
    deadline = time.monotonic() + (60 if number == signal.SIGKILL else 10)
    while not gone(children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
