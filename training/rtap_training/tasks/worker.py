"""Child process that judges answers and can be killed: one JSON request and one JSON reply per line."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from rtap_core.errors import ConfigError

START_SECONDS = 120.0  # importing sympy takes half a second, much longer on a busy machine
_SCRIPT = Path(__file__).with_name("equivalence_worker.py")


class Worker:
    """A process of this one, started at the first request and after each failure. Not thread-safe."""

    def __init__(self, command: tuple[str, ...] | None = None) -> None:
        self._command = command or (sys.executable, "-P", str(_SCRIPT))
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request. Raises TimeoutError after ``seconds``, OSError if the worker has crashed, ConfigError
        if it cannot start."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            process.stdin.flush()
            return json.loads(_read_line(process, seconds))
        except OSError:  # TimeoutError is one
            self.close()
            raise

    def close(self) -> None:
        """Stop the process; the next request starts a new one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        """The worker of this process, started if needed (a forked process must not share pipes)."""
        if self._process is None or self._owner != os.getpid():
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            self._owner = os.getpid()
            try:
                _read_line(self._process, START_SECONDS)
            except OSError as error:
                self.close()
                raise ConfigError(
                    "math-verify, which compares answers, does not start; "
                    "run `python -c 'import math_verify'`, and install rtap[train] if it is missing"
                ) from error
        return self._process


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Read one line. Raises TimeoutError after ``seconds``, BrokenPipeError if the process has exited."""
    assert process.stdout is not None
    deadline, line = monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, deadline - monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(process.stdout.fileno(), 65_536)
        if not chunk:
            raise BrokenPipeError
        line += chunk
    return line
