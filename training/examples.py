"""What a confidence generator is trained and judged on: single cycles, labelled, with their balance weights.

Balance is the paper's (R-TAP eq. 6): within each question right and wrong cycles weigh the same in sum. Questions
whose cycles are all right or all wrong have no contrast; eq. 6 is undefined there, so they get a smaller total weight
and only teach the general level. Synthetic pairs (a right working and hard wrong ones) give most of them contrast.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from server.rtap.format import RTAP
from training.tasks.base import Attempt, Problem
from training.tasks.countdown import CountdownProblem, attempt_text, candidates

Row = tuple[int, tuple[int, ...], bool]
"""Question index, prompt and cycle ids, right or not."""


@dataclass(frozen=True, slots=True)
class Example:
    """One distinct cycle of one question. ``count``: how often it was sampled."""

    question: int
    ids: tuple[int, ...]
    is_right: bool
    count: int
    weight: float = 0.0


def collect(rows: Iterable[Row]) -> list[Example]:
    """Merge equal rows; order of first appearance."""
    counts = Counter(rows)
    return [Example(question, ids, is_right, count) for (question, ids, is_right), count in counts.items()]


def balance(examples: Sequence[Example], *, global_weight: float) -> list[Example]:
    """Set the weights: a question's right cycles sum to 1/2, its wrong ones to 1/2; without contrast all sum to
    ``global_weight``."""
    totals: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for example in examples:
        totals[example.question][example.is_right] += example.count
    weighted: list[Example] = []
    for e in examples:
        wrong, right = totals[e.question]
        if wrong and right:
            weight = e.count / (2 * (right if e.is_right else wrong))
        else:
            weight = global_weight * e.count / (wrong + right)
        weighted.append(Example(e.question, e.ids, e.is_right, e.count, weight))
    return weighted


def synthetic_texts(problem: Problem, rng: Random, pairs: int) -> list[tuple[str, bool]]:
    """``pairs`` right and wrong cycles as text; half of the wrong Countdown ones lie in ways a sampler rarely does."""
    texts: list[tuple[str, bool]] = []
    for _ in range(pairs):
        right = problem.right_attempt(rng)
        wrong = problem.wrong_attempt(rng, [])
        doubt = problem.doubt(rng, wrong) if wrong and rng.random() < 0.4 else ""
        texts.append((cycle_text(right, doubt), True))
        if isinstance(problem, CountdownProblem) and rng.random() < 0.5:
            false = false_cycle(problem, rng, doubt)
            if false is not None:
                texts.append((false, False))
                continue
        if wrong is not None:
            texts.append((cycle_text(wrong, doubt), False))
    return texts


def cycle_text(attempt: Attempt, doubt: str) -> str:
    """A cycle as the policy would write it."""
    return RTAP.render_cycle(doubt + "".join(s.text for s in attempt.think), attempt.answer.text)


def false_cycle(problem: CountdownProblem, rng: Random, doubt: str) -> str | None:
    """A cycle that looks right and is wrong: a false last result, foreign or repeated numbers, or an answer that is
    not what the working computed. None when this draw finds none."""
    match rng.randrange(3):
        case 0:
            misses = [c for c in candidates(problem.numbers) if c.value != problem.target]
            near = sorted(misses, key=lambda c: abs(c.value - problem.target))[:8]
            chosen = rng.choice(near)
            return RTAP.render_cycle(doubt + attempt_text(chosen, last=problem.target), chosen.expression)
        case 1:
            return _foreign_numbers(problem, rng, doubt)
        case _:
            right = problem.right_attempt(rng)
            wrong = problem.wrong_attempt(rng, [])
            if wrong is None:
                return None
            think = "".join(s.text for s in right.think)
            return RTAP.render_cycle(doubt + think, wrong.answer.text)


def _foreign_numbers(problem: CountdownProblem, rng: Random, doubt: str) -> str | None:
    """Reach the target truly, but with one number replaced by a neighbour or by another of the three."""
    for _ in range(12):
        numbers = list(problem.numbers)
        index = rng.randrange(3)
        others = [n for i, n in enumerate(numbers) if i != index]
        numbers[index] = rng.choice([*others, *(max(1, numbers[index] + d) for d in (-3, -2, -1, 1, 2, 3))])
        if sorted(numbers) == sorted(problem.numbers):
            continue
        a, b, c = numbers
        hits = [x for x in candidates((a, b, c)) if x.value == problem.target]
        if hits:
            chosen = rng.choice(hits)
            return RTAP.render_cycle(doubt + attempt_text(chosen), chosen.expression)
    return None
