"""Countdown task: reach a target with three numbers and ``+ - *``, each number used exactly once.

Finding an expression takes a search, checking one takes two operations; a confidence generator needs this asymmetry.
Workings are correct calculations, so a wrong attempt is an expression with another value than the target. Its results
and answer are trained, because they are true. The choice of operands that left the path to a solution is masked; after
a first step that no solution starts with, the second is trained. No working states whether it reached the target.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random

from rtap_training.tasks.base import Attempt, Segment
from rtap_training.tasks.expression import evaluate

SMALL_NUMBER = 10
MAX_NUMBER = 25
SMALL_SHARE = 0.6
MAX_VALUE = 999

_TARGET = re.compile(r"\b(?:makes?|get|reach|target|equals?)\b(?:\s+(?:is|to|of|the number))*[\s:=]*(\d{1,6})\b")
_INTEGER = re.compile(r"\d+")

_PHRASINGS = (
    "make {t} from {n}",
    "Make {t} from {n}",
    "Make {t} from {n}.",
    "make {t} using {n}",
    "Make {t} using {n}.",
    "Make {t} with {n}.",
    "Using {n} make {t}",
    "Using {n}, make {t}.",
    "Use {n} to make {t}.",
    "use {n} to make {t}",
    "From {n} make {t}.",
    "How can I make {t} from {n}?",
    "How do I get {t} from {n}?",
    "Can you make {t} out of {n}?",
    "get {t} from {n}",
    "Reach {t} with {n}.",
    "Countdown: make {t} from {n}",
    "Countdown: {n}, target {t}",
    "numbers {n} target {t}",
    "Numbers: {n}. Target: {t}.",
)
_LISTS = (", ", ", ", ", ", ",", " ", "and")

_DOUBTS = (
    "Oops, {v} is not {t}. ",
    "Oops, {v} is not {t}. ",
    "Wait, {v} is not {t}. ",
    "Hmm, {v} is not {t}. ",
    "Oops. ",
    "Wait, ",
    "Let me try again: ",
    "Let me try again: ",
    "That was wrong. ",
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One canonical expression over all three numbers: two steps and its value."""

    expression: str
    steps: tuple[tuple[str, int], ...]
    value: int


def _sums(a: int, b: int, c: int) -> Iterator[tuple[str, list[tuple[int, str, int]]]]:
    """Sums and differences in one canonical spelling: positive terms first, each group descending."""
    numbers = (a, b, c)
    for size in (3, 2, 1):
        for chosen in combinations(range(3), size):
            plus = sorted((numbers[i] for i in chosen), reverse=True)
            minus = sorted((numbers[i] for i in range(3) if i not in chosen), reverse=True)
            terms = [("+", n) for n in plus] + [("-", n) for n in minus]
            text = "".join(op + str(n) for op, n in terms)[1:]
            first = terms[0][1] + terms[1][1] if terms[1][0] == "+" else terms[0][1] - terms[1][1]
            yield text, [(terms[0][1], terms[1][0], terms[1][1]), (first, terms[2][0], terms[2][1])]


def _products(a: int, b: int, c: int) -> Iterator[tuple[str, list[tuple[int, str, int]]]]:
    """Expressions with at least one product."""
    x, y, z = sorted((a, b, c), reverse=True)
    yield f"{x}*{y}*{z}", [(x, "*", y), (x * y, "*", z)]
    for p, q, r in ((x, y, z), (x, z, y), (y, z, x)):
        yield f"{p}*{q}+{r}", [(p, "*", q), (p * q, "+", r)]
        yield f"{p}*{q}-{r}", [(p, "*", q), (p * q, "-", r)]
        yield f"{r}-{p}*{q}", [(p, "*", q), (r, "-", p * q)]
        yield f"({p}+{q})*{r}", [(p, "+", q), (p + q, "*", r)]
        yield f"({p}-{q})*{r}", [(p, "-", q), (p - q, "*", r)]


_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@lru_cache(maxsize=8192)
def candidates(numbers: tuple[int, int, int]) -> tuple[Candidate, ...]:
    """All distinct canonical expressions with intermediate values in 0..999."""
    found: dict[str, Candidate] = {}
    for text, operations in (*_sums(*numbers), *_products(*numbers)):
        results = [_APPLY[op](left, right) for left, op, right in operations]
        if all(0 <= r <= MAX_VALUE for r in results):
            steps = tuple((f"{left}{op}{right}=", r) for (left, op, right), r in zip(operations, results, strict=True))
            found.setdefault(text, Candidate(text, steps, results[-1]))
    return tuple(found.values())


def attempt_text(candidate: Candidate, *, last: int | None = None) -> str:
    """The working as text. last: false final result, for hard negatives."""
    (first, first_result), (second, second_result) = candidate.steps
    return f"{first}{first_result} {second}{second_result if last is None else last}"


def _attempt(candidate: Candidate, solutions: Sequence[Candidate]) -> Attempt:
    is_right = candidate in solutions
    is_dead_end = all(candidate.steps[0] != s.steps[0] for s in solutions)
    (first, first_result), (second, second_result) = candidate.steps
    think = (
        Segment(first, is_trained=is_right),
        Segment(f"{first_result} "),
        Segment(second, is_trained=is_right or is_dead_end),
        Segment(str(second_result)),
    )
    return Attempt(think, Segment(candidate.expression), candidate.value, is_right)


def _false(think: str, answer: str, value: int) -> Attempt:
    return Attempt((Segment(think, is_trained=False),), Segment(answer, is_trained=False), value, is_right=False)


@dataclass(frozen=True, slots=True)
class CountdownProblem:
    """Three numbers, in question order, and a reachable target."""

    numbers: tuple[int, int, int]
    target: int

    @property
    def canonical(self) -> str:
        """Target and sorted numbers, so that their order does not affect the split."""
        return f"countdown:{self.target}:{','.join(map(str, sorted(self.numbers)))}"

    @property
    def reference(self) -> str:
        """The first solution. Others may exist, so answers are checked by evaluation."""
        return self._solutions()[0].expression

    def _solutions(self) -> list[Candidate]:
        return [c for c in candidates(self.numbers) if c.value == self.target]

    def phrase(self, rng: Random) -> str:
        """One of the phrasings with one of the list styles."""
        style = rng.choice(_LISTS)
        a, b, c = self.numbers
        listed = f"{a}, {b} and {c}" if style == "and" else style.join(map(str, self.numbers))
        return rng.choice(_PHRASINGS).format(t=self.target, n=listed)

    def right_attempt(self, rng: Random, /) -> Attempt:
        """A uniformly drawn solution."""
        solutions = self._solutions()
        return _attempt(rng.choice(solutions), solutions)

    def wrong_attempt(self, rng: Random, earlier: Sequence[Attempt]) -> Attempt | None:
        """A correctly computed miss not in ``earlier``; near misses are preferred."""
        tried = {a.answer.text for a in earlier}
        misses = [c for c in candidates(self.numbers) if c.value != self.target and c.expression not in tried]
        if not misses:
            return None
        weights = [1 / (5 + abs(c.value - self.target)) for c in misses]
        return _attempt(rng.choices(misses, weights)[0], self._solutions())

    def doubt(self, rng: Random, value: int, /) -> str:
        """A phrase of doubt that usually names the value reached."""
        return rng.choice(_DOUBTS).format(v=value, t=self.target)

    def false_attempt(self, rng: Random, /) -> Attempt | None:
        """A false last result, wrong numbers, or an answer that differs from the working."""
        match rng.randrange(3):
            case 0:
                misses = [c for c in candidates(self.numbers) if c.value != self.target]
                near = sorted(misses, key=lambda c: abs(c.value - self.target))[:8]
                chosen = rng.choice(near)
                return _false(attempt_text(chosen, last=self.target), chosen.expression, self.target)
            case 1:
                hit = self._hit_with_foreign_numbers(rng)
                return None if hit is None else _false(attempt_text(hit), hit.expression, hit.value)
            case _:
                wrong = self.wrong_attempt(rng, [])
                right = rng.choice(self._solutions())
                return None if wrong is None else _false(attempt_text(right), wrong.answer.text, right.value)

    def _hit_with_foreign_numbers(self, rng: Random) -> Candidate | None:
        """Reach the target with one number replaced by a neighbour or by another of the three."""
        for _ in range(12):
            numbers = list(self.numbers)
            index = rng.randrange(3)
            others = [n for i, n in enumerate(numbers) if i != index]
            numbers[index] = rng.choice([*others, *(max(1, numbers[index] + d) for d in (-3, -2, -1, 1, 2, 3))])
            if sorted(numbers) == sorted(self.numbers):
                continue
            a, b, c = numbers
            hits = [x for x in candidates((a, b, c)) if x.value == self.target]
            if hits:
                return rng.choice(hits)
        return None


def _number(rng: Random) -> int:
    return rng.randint(1, SMALL_NUMBER if rng.random() < SMALL_SHARE else MAX_NUMBER)


def parse_question(question: str) -> CountdownProblem | None:
    """Parse target and numbers from any phrasing; None unless it is a Countdown question with three numbers."""
    lowered = question[:400].lower()
    matches = list(_TARGET.finditer(lowered))
    if len(matches) != 1:
        return None
    span = matches[0].span(1)
    rest = lowered[: span[0]] + " " + lowered[span[1] :]
    numbers = [int(n) for n in _INTEGER.findall(rest)[:8] if len(n) <= 6]
    if len(numbers) != 3:
        return None
    return CountdownProblem((numbers[0], numbers[1], numbers[2]), int(matches[0].group(1)))


class Countdown:
    """Countdown task."""

    name = "countdown"
    wrong_first_share = 0.4
    # Halves each time: after any number of misses the next attempt is right about half the time.
    wrong_count_weights = (0.54, 0.24, 0.11, 0.05, 0.03, 0.02, 0.01)

    def sample(self, rng: Random) -> CountdownProblem:
        """Mostly small numbers, and a uniformly drawn reachable expression, so that products occur."""
        while True:
            a, b, c = (_number(rng) for _ in range(3))
            target = rng.choice(candidates((a, b, c))).value
            if target > 0:
                return CountdownProblem((a, b, c), target)

    def claims(self, question: str) -> bool:
        """True if the text names a target and three numbers."""
        return parse_question(question) is not None

    def check(self, question: str, answer: str) -> bool:
        """True if the expression equals the target and uses each number exactly once."""
        problem = parse_question(question)
        result = evaluate(answer)
        if problem is None or result is None:
            return False
        return result.value == problem.target and Counter(result.numbers) == Counter(problem.numbers)
