"""Answer equivalence: as text, then as mathematics with math-verify in a worker process.

math-verify limits time with signals, which only work in a main thread, so it runs in a process that is restarted when a
comparison times out. Failures are counted. A worker that cannot start is an error, because a checker that rejects
everything looks like a policy that is always wrong.
"""

import atexit
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from rtap_training.tasks.base import normalised
from rtap_training.tasks.worker import Tally, Worker

LIMIT_SECONDS = 5.0
MAX_LENGTH = 500
_CACHE_SIZE = 65_536
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_NAME = re.compile(r"\\?[a-z]+")
# Mathematical names that may be written with or without a backslash; not words of an answer.
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
    """Numbers of distinct mathematical comparisons, by outcome."""

    compared: int = 0
    equal: int = 0
    unreadable_references: int = 0
    unreadable_answers: int = 0
    timeouts: int = 0
    failures: int = 0


def plain(answer: str) -> str:
    """The answer without typesetting."""
    return normalised(_TEXT.sub(r"\1", answer.replace("\\$", "").replace("$", "")))


def names_in(answer: str) -> frozenset[str]:
    """Words and variables of an answer."""
    found = _NAME.findall(_TEXT.sub(r" \1 ", answer).casefold())
    return frozenset(n for n in found if n[0] != "\\" and n not in _MATHEMATICAL)


def may_be_equal(answer: str, reference: str) -> bool:
    """False if a mathematical comparison would mislead: it reads "Paris" and "pairs" as the same product of letters.

    An answer may omit names of the reference (a unit, ``x=``) but may not contain others.
    """
    named = names_in(reference)
    return not named or names_in(answer) in (named, frozenset())


class Comparer:
    """Compare answers with one worker process. Thread-safe."""

    def __init__(self, limit_seconds: float = LIMIT_SECONDS, command: tuple[str, ...] | None = None) -> None:
        self._limit = limit_seconds
        self._worker = Worker(command)
        self._lock = Lock()
        self._cache: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._tally = Tally(Counts(), logger, "comparing answers")

    @property
    def counts(self) -> Counts:
        """Counts so far."""
        return self._tally.counts

    def same(self, answer: str, reference: str) -> bool:
        """True if ``answer`` is equivalent to ``reference``. Raises ConfigError if no worker can be started."""
        if len(answer) > MAX_LENGTH:  # before any parsing
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
        """Stop the worker; the next comparison starts a new one."""
        self._worker.close()

    def _compare(self, answer: str, reference: str) -> bool:
        self._tally.add("compared")
        try:
            reply = self._worker.ask({"answer": answer, "reference": reference}, self._limit)
        except TimeoutError:
            self._tally.add("timeouts", f"{answer!r} against {reference!r} took over {self._limit:g} s")
            return False
        except OSError:
            self._tally.add("failures", f"{answer!r} against {reference!r} crashed the worker")
            return False
        if reply["error"]:
            self._tally.add("failures", f"{answer!r} against {reference!r}: {reply['error']}")
        elif not reply["reference"]:
            self._tally.add("unreadable_references", f"math-verify cannot parse the reference {reference!r}")
        elif not reply["answer"]:
            self._tally.add("unreadable_answers")
        elif reply["equal"]:
            self._tally.add("equal")
        return bool(reply["equal"])


_comparer = Comparer()
atexit.register(_comparer.close)


def same_answer(answer: str, reference: str) -> bool:
    """True if two answers are equivalent, by the comparer of this process."""
    return _comparer.same(answer, reference)


def counts() -> Counts:
    """Counts of the comparer of this process."""
    return _comparer.counts
