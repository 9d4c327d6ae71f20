"""Whether two answers mean the same: as text first, then as mathematics, which a worker process decides.

math-verify's own limits are signals, which only work in a main thread, so it runs in a process that is killed and
started anew when a comparison takes too long. What went wrong is counted, and a worker that cannot run at all is an
error: a checker that quietly says no to everything would look like a policy that is always wrong.
"""

import atexit
import json
import logging
import os
import re
import select
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, cast

from rtap_core.answers import normalise_answer
from rtap_core.errors import ConfigError

LIMIT_SECONDS = 5.0
MAX_LENGTH = 500
_START_SECONDS = 120.0  # importing sympy takes half a second, and much longer on a machine that is busy
_CACHE_SIZE = 65_536
_WORKER = Path(__file__).with_name("equivalence_worker.py")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_NAME = re.compile(r"\\?[a-z]+")
# Spelt with a backslash by one and without by the other; no words of an answer.
_MATHEMATICAL = frozenset(
    (
        "sqrt",
        "frac",
        "pi",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "exp",
        "infty",
        "oo",
        "or",
        "and",
        "cdot",
        "times",
        "e",
        "i",
    )
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """Different comparisons that text did not settle, and what came of them."""

    compared: int = 0
    equal: int = 0
    unreadable_references: int = 0
    unreadable_answers: int = 0
    timeouts: int = 0
    failures: int = 0


def plain(answer: str) -> str:
    """The answer without what only typesets it."""
    return normalise_answer(_TEXT.sub(r"\1", answer.replace("\\$", "").replace("$", "")))


def names_in(answer: str) -> frozenset[str]:
    """Words and variables of an answer."""
    found = _NAME.findall(_TEXT.sub(r" \1 ", answer).casefold())
    return frozenset(n for n in found if n[0] != "\\" and n not in _MATHEMATICAL)


def may_be_equal(answer: str, reference: str) -> bool:
    """False where reading as mathematics would mislead: it takes "Paris" and "pairs" for one product of letters.

    An answer may leave out what the reference names (a unit, ``x=``), but not name something else.
    """
    named = names_in(reference)
    return not named or names_in(answer) in (named, frozenset())


class Comparer:
    """Compares answers, with one worker process. Safe to call from threads; they take turns."""

    def __init__(self, limit_seconds: float = LIMIT_SECONDS, command: tuple[str, ...] | None = None) -> None:
        self._limit = limit_seconds
        self._command = command or (sys.executable, "-P", str(_WORKER))
        self._lock = Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._cache: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """What happened so far."""
        return self._counts

    def same(self, answer: str, reference: str) -> bool:
        """Whether ``answer`` means what ``reference`` means. Raises ConfigError where no worker can be started."""
        if len(answer) > MAX_LENGTH:  # before anything reads it
            return answer.strip() == reference.strip()
        if plain(answer) == plain(reference):
            return True
        if not plain(answer) or not plain(reference) or not may_be_equal(answer, reference):
            return False
        key = (answer.strip(), reference.strip())
        with self._lock:
            if key not in self._cache:
                self._cache[key] = self._compare(*key)
                if len(self._cache) > _CACHE_SIZE:
                    self._cache.popitem(last=False)
            return self._cache[key]

    def close(self) -> None:
        """End the worker; the next comparison starts another."""
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.kill()
            worker.communicate()

    def _compare(self, answer: str, reference: str) -> bool:
        self._count("compared")
        request = {"answer": answer, "reference": reference, "seconds": self._limit}
        try:
            reply = self._ask(json.dumps(request))
        except TimeoutError:
            self._count("timeouts", f"{answer!r} against {reference!r} took over {self._limit:g} s")
            self.close()
            return False
        except OSError:
            self._count("failures", f"{answer!r} against {reference!r} ended the worker")
            self.close()
            return False
        if reply["error"]:
            self._count("failures", f"{answer!r} against {reference!r}: {reply['error']}")
        elif not reply["reference"]:
            self._count("unreadable_references", f"{reference!r} is no mathematics to math-verify")
        elif not reply["answer"]:
            self._count("unreadable_answers")
        elif reply["equal"]:
            self._count("equal")
        return bool(reply["equal"])

    def _count(self, name: str, warning: str | None = None) -> None:
        """Count, and say so the first time."""
        so_far = cast(int, getattr(self._counts, name))
        self._counts = replace(self._counts, **{name: so_far + 1})
        if warning is not None and so_far == 0:
            logger.warning("comparing answers: %s; counted as wrong, more of these only in the counts", warning)

    def _ask(self, request: str) -> dict[str, Any]:
        worker = self._running()
        assert worker.stdin is not None
        worker.stdin.write(request.encode() + b"\n")
        worker.stdin.flush()
        return json.loads(_read_line(worker, self._limit))

    def _running(self) -> subprocess.Popen[bytes]:
        """The worker, started when there is none of this process's own (a fork must not share pipes)."""
        if self._worker is None or self._owner != os.getpid():
            pipe = subprocess.PIPE
            self._worker = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            self._owner = os.getpid()
            try:
                _read_line(self._worker, _START_SECONDS)
            except OSError as error:
                self.close()
                raise ConfigError(
                    "answers are compared by math-verify, which does not start; "
                    "try `python -c 'import math_verify'`, and install rtap[train] if it is missing"
                ) from error
        return self._worker


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of the worker. Raises TimeoutError after ``seconds``, BrokenPipeError when it has ended."""
    assert worker.stdout is not None
    deadline, line = monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not select.select([worker.stdout], [], [], max(0.0, deadline - monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(worker.stdout.fileno(), 65_536)
        if not chunk:
            raise BrokenPipeError
        line += chunk
    return line


_comparer = Comparer()
atexit.register(_comparer.close)


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers mean the same, by the process's one comparer."""
    return _comparer.same(answer, reference)


def counts() -> Counts:
    """What that comparer met so far."""
    return _comparer.counts
