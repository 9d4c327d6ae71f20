"""Labelled, weighted cycles for training a confidence generator.

Weights follow R-TAP eq. 6: within each question right and wrong cycles have equal total weight. Eq. 6 is undefined for
questions whose cycles are all right or all wrong; they get the total weight ``global_weight``. Synthetic pairs (a right
cycle and a hard wrong one) give most questions contrast.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from rtap_core.format import RTAP
from rtap_training.tasks.base import Attempt, Problem

Row = tuple[int, tuple[int, ...], bool]
"""(question index, prompt and cycle ids, is right)"""


@dataclass(frozen=True, slots=True)
class Example:
    """One distinct cycle of a question. count: times it was sampled."""

    question: int
    ids: tuple[int, ...]
    is_right: bool
    count: int
    weight: float = 0.0


def collect(rows: Iterable[Row]) -> list[Example]:
    """Merge equal rows, in order of first appearance."""
    counts = Counter(rows)
    return [Example(question, ids, is_right, count) for (question, ids, is_right), count in counts.items()]


def balance(examples: Sequence[Example], *, global_weight: float) -> list[Example]:
    """Set weights: right and wrong cycles of a question sum to 1/2 each; without contrast all sum to
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


def group(examples: Sequence[Example], batch_tokens: int) -> list[list[Example]]:
    """Batches of similar length with at most ``batch_tokens`` padded tokens."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: len(e.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(example)
    return groups


def read_once(
    rows: Sequence[tuple[int, ...]], batch_tokens: int, read: Callable[[Sequence[Example]], Sequence[float]]
) -> list[float]:
    """Apply ``read`` to every row of ids in batches; equal rows are read once."""
    values: dict[tuple[int, ...], float] = {}
    distinct = [Example(0, ids, False, 1) for ids in dict.fromkeys(rows)]
    for batch in group(distinct, batch_tokens) if distinct else []:
        values |= {example.ids: value for example, value in zip(batch, read(batch), strict=True)}
    return [values[ids] for ids in rows]


def synthetic_texts(problem: Problem, rng: Random) -> list[tuple[str, bool]]:
    """Two right and two wrong cycles as text. Where the task has false attempts, half of the wrong ones are false:
    errors that a policy rarely samples."""
    texts: list[tuple[str, bool]] = []
    for _ in range(2):
        right = problem.right_attempt(rng)
        wrong = problem.wrong_attempt(rng, [])
        doubt = problem.doubt(rng, wrong.value) if wrong and rng.random() < 0.4 else ""
        texts.append((cycle_text(right, doubt), True))
        false = problem.false_attempt(rng) if rng.random() < 0.5 else None
        miss = wrong if false is None else false
        if miss is not None:
            texts.append((cycle_text(miss, doubt), False))
    return texts


def cycle_text(attempt: Attempt, doubt: str) -> str:
    """Text of a cycle as the policy writes it."""
    return RTAP.render_cycle(doubt + "".join(s.text for s in attempt.think), attempt.answer.text)


def unrelated_text(rng: Random) -> str:
    """A message of one to ten words of random letters: no question of a bundled task."""
    opening = rng.choice(("", "", "What is ", "Who is ", "Make ", "Solve "))
    words = ("".join(rng.choices(ascii_lowercase, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 10)))
    return opening + " ".join(words) + rng.choice(("", "", "?", "."))
