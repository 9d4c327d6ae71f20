"""Questions of reasoning-gym's datasets (``rg:NAME?option=value&…``), judged by the dataset's own verifier.

Source: reasoning-gym 0.1.25. It is an optional dependency, the extra ``rg``.
"""

import atexit
import dataclasses
import difflib
import importlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import unquote

from rtap_core.answers import same_answer as same_text
from rtap_core.errors import ConfigError
from rtap_training.tasks.base import Question
from rtap_training.tasks.equivalence import same_answer
from rtap_training.tasks.worker import Tally, Worker

PREFIX = "rg:"
DEFAULTS = {"size": 200, "seed": 0}
LIMIT_SECONDS = 5.0
_OPEN_SECONDS = 600.0  # the first import of reasoning-gym takes minutes on a busy machine
MAX_LENGTH = 2000
# Their answer is a formula that uses given numbers; only the verifier may judge it, as any formula has the right value.
FORMULAS = frozenset(("countdown", "puzzle24"))
# Their verifiers evaluate the answer with sympy's parse_expr; only arithmetic is passed on to them.
PARSING = frozenset(("intermediate_integration", "polynomial_multiplication", "simple_integration"))
_ARITHMETIC = re.compile(r"[\d\s+\-*/().]*")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_OPERATORS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "·": "*", "÷": "/", "−": "-"}
_LAYOUT = re.compile(r"\\left|\\right|\\[,;:! ]|\\[()\[\]]|\$")
_VALUE = re.compile(r"=\s*-?[\d.]+\s*\.?\s*$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GymQuestion(Question):
    """Entry ``index`` of a dataset. options: those of the dataset, as JSON."""

    dataset: str
    options: str
    index: int


def read_dataset(source: str) -> list[GymQuestion]:
    """The distinct questions of ``rg:NAME?option=value&…``; option values are JSON or text. Raises ConfigError."""
    name, given = _parse(source)
    dataset, options = _create(source, name, given), json.dumps(given)
    shape = "&".join(f"{key}={_shown(value)}" for key, value in given.items() if key not in DEFAULTS)
    task, found = f"{name}?{shape}" if shape else name, dict[str, GymQuestion]()
    for index in range(given["size"]):
        entry = dataset[index]
        text, answer = str(entry["question"]), str(entry["answer"])
        found.setdefault(text, GymQuestion(text, answer, task, name, options, index))
    return list(found.values())


def _parse(source: str) -> tuple[str, dict[str, Any]]:
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = dict(DEFAULTS)
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"{source!r}: {item!r} must be option=value")
        try:
            options[key] = json.loads(unquote(value))
        except json.JSONDecodeError:
            options[key] = unquote(value)
    for key in DEFAULTS:
        if type(options[key]) is not int or options[key] < 0:
            raise ConfigError(f"{source!r}: {key} must be an integer of at least 0, not {_shown(options[key])}")
    return name, options


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _create(source: str, name: str, options: Mapping[str, Any]) -> Any:
    try:
        reasoning_gym: Any = importlib.import_module("reasoning_gym")
        known: Mapping[str, tuple[Any, Any]] = importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise ConfigError(f"{source!r} needs reasoning-gym; install it with `pip install 'rtap[rg]'`") from error
    if name == "composite":
        raise ConfigError(f"{source!r} mixes other datasets; name these instead, each as rg:NAME")
    if name not in known:
        near = difflib.get_close_matches(name, known) or sorted(known)
        raise ConfigError(f"{source!r}: reasoning-gym has no dataset {name!r}; choose from {', '.join(near)}")
    allowed = [field.name for field in dataclasses.fields(known[name][1])]
    if unknown := [key for key in options if key not in allowed]:
        raise ConfigError(f"{source!r}: {name} has no option {unknown[0]!r}; choose from {', '.join(allowed)}")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{source!r}: {name} refuses these options: {error}") from error


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of distinct answers passed to verifiers, and of those that count as wrong because the verifier failed."""

    judged: int = 0
    errors: int = 0
    timeouts: int = 0
    crashes: int = 0


class Verifier:
    """Verifiers of datasets in a worker process. Thread-safe."""

    def __init__(self, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._limit = limit_seconds
        self._worker, self._lock = Worker(), Lock()
        self._ready: set[tuple[str, str]] = set()
        self._verdicts: dict[tuple[GymQuestion, str], bool] = {}
        self._tally = Tally(Counts(), logger, "verifying answers")

    @property
    def counts(self) -> Counts:
        """Counts so far."""
        return self._tally.counts

    def start(self, question: GymQuestion) -> None:
        """Load the verifier of the question's dataset. Raises ConfigError if it does not start."""
        with self._lock:
            self._start(question)

    def is_right(self, question: GymQuestion, answer: str) -> bool:
        """True if the answer has the full score, or is the reference number in another notation."""
        if len(answer) > MAX_LENGTH:
            return False
        if question.dataset in FORMULAS:
            formula = plain_formula(answer)
            return formula is not None and self._verdict(question, formula)
        if _is_number(question.answer) and same_text(answer, question.answer):
            return True
        if question.dataset in PARSING and not _ARITHMETIC.fullmatch(answer):
            return same_answer(answer, question.answer)
        return self._verdict(question, answer)

    def _verdict(self, question: GymQuestion, answer: str) -> bool:
        key = (question, answer)
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._score(question, answer) >= 1.0
            return self._verdicts[key]

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    def _start(self, question: GymQuestion) -> None:
        source = (question.dataset, question.options)
        if source in self._ready:
            return
        try:
            opened = self._worker.ask(_request(question), _OPEN_SECONDS)
        except OSError as error:
            self._ready.clear()
            reason = f"it took over {_OPEN_SECONDS:g} s" if isinstance(error, TimeoutError) else "its process crashed"
            raise ConfigError(f"the verifier of {question.dataset} does not start: {reason}") from error
        if opened["error"]:
            raise ConfigError(f"the verifier of {question.dataset} does not start: {opened['error']}")
        self._ready.add(source)

    def _score(self, question: GymQuestion, answer: str) -> float:
        self._start(question)
        self._tally.add("judged")
        subject = f"{answer[:200]!r} by {question.dataset}"
        try:
            reply = self._worker.ask(_request(question) | {"index": question.index, "answer": answer}, self._limit)
        except TimeoutError:
            self._ready.clear()
            self._tally.add("timeouts", f"{subject} took over {self._limit:g} s")
            return 0.0
        except OSError:
            self._ready.clear()
            self._tally.add("crashes", f"{subject} crashed the worker")
            return 0.0
        if reply["error"]:
            self._tally.add("errors", f"{subject}: {reply['error']}")
        return float(reply["score"])


def _request(question: GymQuestion) -> dict[str, Any]:
    return {"dataset": question.dataset, "options": json.loads(question.options)}


def plain_formula(answer: str) -> str | None:
    """The formula with ``+ - * /`` in place of LaTeX and without a final ``= value``; None if it is not arithmetic."""
    replaced = 1
    while replaced:
        answer, replaced = _FRACTION.subn(r"((\1)/(\2))", answer)
    for written, operator in _OPERATORS.items():
        answer = answer.replace(written, operator)
    formula = _VALUE.sub("", _LAYOUT.sub("", answer)).strip()
    is_plain = _ARITHMETIC.fullmatch(formula) and not re.search(r"\*\s*\*|/\s*/", formula)  # no powers
    return formula if formula and is_plain else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_verifier = Verifier()
atexit.register(_verifier.close)


def is_right(question: GymQuestion, answer: str) -> bool:
    """True if the dataset's verifier accepts the answer, by the verifier of this process."""
    return _verifier.is_right(question, answer)


def start(question: GymQuestion) -> None:
    """Load the verifier of the question's dataset in the worker of this process."""
    _verifier.start(question)


def counts() -> Counts:
    """Counts of the verifier of this process."""
    return _verifier.counts
