"""Run an rtap server as a child process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import httpx

import rtap_core
from rtap_core.errors import ConfigError

STOP_SECONDS = 30.0


def serve_command(model: str | None, confidence_model: str | None, flags: Sequence[str]) -> list[str]:
    """Command line of ``rtap serve`` without host and port. model None: the bundled models."""
    command = [sys.executable, "-m", "rtap_server"]
    if model is not None:
        command.append(model)
    if confidence_model is not None:
        command += ["--confidence-model", confidence_model]
    return [*command, *flags]


@contextmanager
def running_server(
    command: Sequence[str], *, log: Path, ready_seconds: float, ready_path: str = "/ready"
) -> Generator[str]:
    """Start ``command`` on a free local port, yield its base URL when ``ready_path`` answers 200, then stop it.

    Output goes to ``log``. Raises ConfigError with the cause from the log if the server exits or is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    # the child must import this checkout from any working directory
    checkout = str(Path(rtap_core.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its engine processes can be stopped too
        )
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _leave)
        _wait_until_ready(process, base_url + ready_path, log, ready_seconds)
        yield base_url
    finally:
        _stop(process)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Handle a signal so that the server is stopped too."""
    raise SystemExit(128 + number)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path, ready_seconds: float) -> None:
    deadline = time.monotonic() + ready_seconds
    with httpx.Client(timeout=5.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ConfigError(f"the server exited before it was ready: {_cause(log)} (full log: {log})")
            with suppress(httpx.TransportError):  # not listening yet
                if client.get(address).is_success:
                    return
            time.sleep(0.25)
    raise ConfigError(f"the server was not ready after {ready_seconds:.0f} s: {_cause(log)} (full log: {log})")


def _cause(log: Path) -> str:
    """Cause from the log: the server's own message, else the first exception, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    start_up = r"rtap serve: (?!loading |ready at |(?:model|format|policy|confidence|keys|stop): )"
    own = [line for line in lines if re.match(start_up, line)]
    # at the start of a line, or behind vLLM's log prefix
    raised = [found[1] for line in lines if (found := re.search(r"(?:^|\] )([A-Z]\w*(?:Error|Exception): .*)", line))]
    return next(iter([*own, *raised, *reversed(lines)]), "the log is empty")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, wait, then SIGKILL the whole process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # remaining child processes
    process.wait()
