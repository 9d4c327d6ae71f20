"""Arithmetic task: one- and two-digit numbers with written-out partial results.

Checking a result is as hard as computing it, so this task is hard for a confidence generator. A wrong attempt contains
one wrong result and continues correctly from it. The wrong result and the wrong answer are masked, the rest is trained.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rtap_training.tasks.base import Attempt, Segment
from rtap_training.tasks.expression import evaluate

_WORDS = ((" plus ", "+"), (" minus ", "-"), (" times ", "*"), ("×", "*"), ("·", "*"), ("−", "-"), ("÷", "/"))
_EXPRESSION = re.compile(r"[0-9(][0-9+\-*/() ]*")
_LETTER_X = re.compile(r"(?<=[0-9) ])x(?=[0-9( ])")
_ANSWER = re.compile(r"-?[0-9]{1,12}")

_PHRASINGS = (
    "{e}",
    "{e}",
    "{e}",
    "{e}=",
    "{e} = ?",
    "{e}?",
    "What is {e}?",
    "What is {e}?",
    "what is {e}",
    "What's {e}?",
    "Compute {e}",
    "Compute {e}.",
    "Calculate {e}.",
    "calculate {e}",
    "How much is {e}?",
    "Please compute {e}.",
    "Can you tell me what {e} is?",
    "Solve {e}",
)
_DOUBTS = (
    "Oops, let me check. ",
    "Oops, let me check. ",
    "Oops. ",
    "Wait, let me check. ",
    "Wait, ",
    "Hmm, let me do it again. ",
    "Let me try again: ",
    "That was wrong. ",
)


@dataclass(frozen=True, slots=True)
class Result:
    """Reference to the result of an earlier step."""

    step: int


@dataclass(frozen=True, slots=True)
class Step:
    """One written step ``left op right = …``."""

    left: int | Result
    op: str
    right: int | Result


def _apply(left: int, op: str, right: int) -> int:
    match op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left // right


def _add(a: int, b: int) -> list[Step]:
    if a > 9 and b > 9 and b % 10:
        return [Step(a, "+", b // 10 * 10), Step(Result(0), "+", b % 10)]
    return [Step(a, "+", b)]


def _subtract(a: int, b: int) -> list[Step]:
    if a < b:  # positive difference first, then the sign
        return [Step(b, "-", a), Step(a, "-", b)]
    if b > 9 and b % 10:
        return [Step(a, "-", b // 10 * 10), Step(Result(0), "-", b % 10)]
    return [Step(a, "-", b)]


def _multiply(a: int, b: int) -> list[Step]:
    if b > 9 and b % 10:
        return [Step(a, "*", b // 10 * 10), Step(a, "*", b % 10), Step(Result(0), "+", Result(1))]
    if b <= 9 and a > 9 and a % 10:
        return [Step(a // 10 * 10, "*", b), Step(a % 10, "*", b), Step(Result(0), "+", Result(1))]
    return [Step(a, "*", b)]


def _divide(a: int, b: int) -> list[Step]:
    return [Step(b, "*", a // b), Step(a, "/", b)]


@dataclass(frozen=True, slots=True)
class ArithmeticProblem:
    """An expression without spaces, and the steps that compute it. canonical: commuting operands sorted."""

    expression: str
    canonical: str
    steps: tuple[Step, ...]

    @property
    def reference(self) -> str:
        """The value."""
        return str(self._run(None, 0)[-1])

    def _run(self, slipped: int | None, slip: int) -> list[int]:
        """Result of each step; step ``slipped`` is off by ``slip`` and later steps use its result."""
        results: list[int] = []
        for index, step in enumerate(self.steps):
            left = results[step.left.step] if isinstance(step.left, Result) else step.left
            right = results[step.right.step] if isinstance(step.right, Result) else step.right
            results.append(_apply(left, step.op, right) + (slip if index == slipped else 0))
        return results

    def _attempt(self, slipped: int | None, slip: int) -> Attempt:
        results = self._run(slipped, slip)
        think: list[Segment] = []
        for index, step in enumerate(self.steps):
            left = results[step.left.step] if isinstance(step.left, Result) else step.left
            right = results[step.right.step] if isinstance(step.right, Result) else step.right
            think.append(Segment(f"{' ' if index else ''}{left}{step.op}{right}="))
            think.append(Segment(str(results[index]), is_trained=index != slipped))
        is_right = slipped is None
        return Attempt(tuple(think), Segment(str(results[-1]), is_trained=is_right), results[-1], is_right)

    def phrase(self, rng: Random) -> str:
        """The expression with varied spacing and operator spelling, in one of the phrasings."""
        text = self.expression
        style = rng.random()
        if style < 0.4:
            text = re.sub(r"([+\-*/])", r" \1 ", text)
        elif style < 0.46:
            text = re.sub(r"([+\-*/])", lambda m: f" {_SPOKEN[m.group(1)]} ", text)
        elif style < 0.52:
            text = text.replace("*", rng.choice((" x ", "x", "×", " × ")))
        return rng.choice(_PHRASINGS).format(e=text)

    def right_attempt(self, _rng: Random, /) -> Attempt:
        """The single written-out working."""
        return self._attempt(None, 0)

    def wrong_attempt(self, rng: Random, earlier: Sequence[Attempt]) -> Attempt | None:
        """A working with one step off by a digit; never the same wrong answer twice."""
        tried = {a.answer.text for a in earlier}
        for _ in range(20):
            slip = rng.choice((-1, 1)) * rng.choice((1, 1, 2, 10, 10, 20, 100))
            slipped = rng.randrange(len(self.steps))
            results = self._run(slipped, slip)
            # A slip in a helper step (sign, division) may leave the answer right; such a draw is discarded.
            is_new = str(results[-1]) not in tried and str(results[-1]) != self.reference
            if is_new and results[-1] >= -999 and all(r >= 0 for r in results[:-1]):
                return self._attempt(slipped, slip)
        return None

    def doubt(self, rng: Random, _value: int, /) -> str:
        """A phrase of doubt."""
        return rng.choice(_DOUBTS)

    def false_attempt(self, _rng: Random, /) -> Attempt | None:
        """None: every wrong attempt already contains a false statement."""
        return None


_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "/"}


def _ordered(op: str, a: int, b: int) -> str:
    return op.join(str(n) for n in (sorted((a, b), reverse=True) if op in "+*" else (a, b)))


def _then(steps: list[Step], op: str, c: int, *, reverse: bool = False) -> list[Step]:
    """Append a step with the last result as left operand (right if ``reverse``)."""
    last = Result(len(steps) - 1)
    return [*steps, Step(c, op, last) if reverse else Step(last, op, c)]


def _number(rng: Random) -> int:
    """A one-digit number with probability 0.4, else two digits."""
    return rng.randint(1, 9) if rng.random() < 0.4 else rng.randint(10, 99)


_BINARY: dict[str, Callable[[int, int], list[Step]]] = {"+": _add, "-": _subtract, "*": _multiply}


def _binary(rng: Random) -> ArithmeticProblem:
    op = rng.choice("+-**")
    a, b = _number(rng), _number(rng)
    if op == "-" and a < b and rng.random() < 0.8:
        a, b = b, a
    return ArithmeticProblem(f"{a}{op}{b}", f"arithmetic:{_ordered(op, a, b)}", tuple(_BINARY[op](a, b)))


def _chain(rng: Random) -> ArithmeticProblem:
    """a*b±c, c+a*b, a+b±c."""
    first, then = rng.choice("**+"), rng.choice("+-")
    a, b, c = _number(rng), _number(rng), _number(rng)
    if then == "-" and c > _apply(a, first, b):
        then = "+"
    steps = _BINARY[first](a, b)
    canonical = f"arithmetic:{_ordered(first, a, b)}{then}{c}"
    if first == "*" and then == "+" and rng.random() < 0.3:
        return ArithmeticProblem(f"{c}+{a}*{b}", canonical, tuple(_then(steps, "+", c, reverse=True)))
    return ArithmeticProblem(f"{a}{first}{b}{then}{c}", canonical, tuple(_then(steps, then, c)))


def _quotient(rng: Random) -> ArithmeticProblem:
    quotient, divisor = rng.randint(2, 50), rng.randint(2, 12)
    dividend = quotient * divisor
    return ArithmeticProblem(
        f"{dividend}/{divisor}", f"arithmetic:{dividend}/{divisor}", tuple(_divide(dividend, divisor))
    )


def parse_expression(question: str) -> str | None:
    """The only expression in a question, in plain spelling; None if there is not exactly one."""
    text = question[:400].lower()
    for word, op in _WORDS:
        text = text.replace(word, op)
    text = _LETTER_X.sub("*", text)
    found = [m.strip() for m in _EXPRESSION.findall(text)]
    return found[0] if len(found) == 1 and any(op in found[0] for op in "+-*/") else None


class Arithmetic:
    """Arithmetic task."""

    name = "arithmetic"
    wrong_first_share = 0.22
    wrong_count_weights = (0.75, 0.2, 0.05)

    def sample(self, rng: Random) -> ArithmeticProblem:
        """Two-number problems (50 %), three-number chains (43 %), exact divisions (7 %)."""
        draw = rng.random()
        return _binary(rng) if draw < 0.5 else _chain(rng) if draw < 0.93 else _quotient(rng)

    def claims(self, question: str) -> bool:
        """True if the text contains exactly one expression."""
        return parse_expression(question) is not None

    def check(self, question: str, answer: str) -> bool:
        """Exact comparison with the value of the expression in the question."""
        expression = parse_expression(question)
        result = evaluate(expression) if expression is not None else None
        if result is None or not _ANSWER.fullmatch(answer.strip()):
            return False
        return result.value == int(answer)
