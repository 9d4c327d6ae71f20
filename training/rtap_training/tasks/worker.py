"""Child process that judges answers and can be killed: one JSON request and one JSON reply per line.

Its failures are counted (``Tally``).
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from logging import Logger
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rtap_core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Counts = TypeVar("Counts", bound="DataclassInstance")
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


class Tally(Generic[Counts]):
    """Counts of outcomes, of which failures are logged at their first occurrence. activity: for the log."""

    def __init__(self, counts: Counts, logger: Logger, activity: str) -> None:
        self.counts = counts
        self._logger, self._activity = logger, activity

    def add(self, name: str, warning: str | None = None) -> None:
        """Count an outcome, the field ``name`` of the counts."""
        so_far = cast(int, getattr(self.counts, name))
        self.counts = replace(self.counts, **{name: so_far + 1})
        if warning is not None and so_far == 0:
            self._logger.warning("%s: %s; counted as wrong, further cases are only counted", self._activity, warning)


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
