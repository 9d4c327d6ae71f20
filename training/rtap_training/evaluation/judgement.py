"""How far a confidence can be believed: shares right by confidence, and the answers it was most wrong about."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import Run
from rtap_training.reliability import Bin, reliability_bins

NUM_BINS = 10  # a curve for readers; the calibration error has its own
WORST = 8  # answers of each kind that are kept


@dataclass(frozen=True, slots=True)
class Mistake:
    """One answer. ``expected``: the reference, one right answer of possibly many."""

    question: str
    answer: str
    expected: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of every answer with a confidence in one run, rejected ones too. ``rule``: the run's label.

    surely_wrong: the wrong answers of highest confidence, highest first. hardly_right: the right ones of lowest, lowest
    first. A question is at most once in each.
    """

    source: str
    rule: str
    answers: int
    bins: tuple[Bin, ...]
    surely_wrong: tuple[Mistake, ...]
    hardly_right: tuple[Mistake, ...]


def judge(run: Run, source: str, questions: Sequence[Question]) -> Judgement | None:
    """None where no answer of the run has a confidence."""
    scored = [
        (questions[outcome.index], cycle.answer, cycle.confidence, cycle.is_correct)
        for outcome in run.answered
        for cycle in outcome.cycles
        if cycle.answer is not None and cycle.confidence is not None
    ]
    if not scored:
        return None
    told = [(Mistake(q.text, answer, q.answer, p), is_right) for q, answer, p, is_right in scored]
    falling = sorted((m for m, is_right in told if not is_right), key=lambda m: -m.confidence)
    rising = sorted((m for m, is_right in told if is_right), key=lambda m: m.confidence)
    confidences = np.array([m.confidence for m, _ in told], dtype=np.float64)
    labels = np.array([is_right for _, is_right in told], dtype=np.bool_)
    bins = tuple(reliability_bins(confidences, labels, bins=NUM_BINS))
    return Judgement(source, run.spec.label, len(told), bins, _first_of_each(falling), _first_of_each(rising))


def _first_of_each(mistakes: Sequence[Mistake]) -> tuple[Mistake, ...]:
    first: dict[str, Mistake] = {}
    for mistake in mistakes:
        first.setdefault(mistake.question, mistake)
    return tuple(first.values())[:WORST]
