"""Reliability of a confidence: share right per bin, and the answers with the largest errors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.statistics import Bin, reliability_bins

NUM_BINS = 10  # of the plotted curve; the calibration error uses other bins
WORST = 8  # answers kept of each kind


@dataclass(frozen=True, slots=True)
class Mistake:
    """A misjudged answer. expected: the reference, which may be one of several right answers."""

    question: str
    answer: str
    expected: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """Reliability of the confidence over all scored answers of one run. rule: label of the run.

    surely_wrong: wrong answers, highest confidence first. hardly_right: right answers, lowest confidence first. At most
    one answer per question in each.
    """

    rule: str
    answers: int
    bins: tuple[Bin, ...]
    surely_wrong: tuple[Mistake, ...]
    hardly_right: tuple[Mistake, ...]


def judge(run: Run, questions: Sequence[Question]) -> Judgement | None:
    """Compute the judgement; None if no answer of the run has a confidence."""
    scored = [
        (questions[outcome.index], cycle.answer, cycle.confidence, cycle.is_correct)
        for outcome in run.answered
        for cycle in outcome.cycles
        if cycle.answer is not None and cycle.confidence is not None
    ]
    if not scored:
        return None
    answers = [(Mistake(q.text, answer, q.answer, p), is_right) for q, answer, p, is_right in scored]
    falling = sorted((m for m, is_right in answers if not is_right), key=lambda m: -m.confidence)
    rising = sorted((m for m, is_right in answers if is_right), key=lambda m: m.confidence)
    confidences = np.array([m.confidence for m, _ in answers], dtype=np.float64)
    labels = np.array([is_right for _, is_right in answers], dtype=np.bool_)
    bins = tuple(reliability_bins(confidences, labels, bins=NUM_BINS))
    return Judgement(run.spec.label, len(answers), bins, _first_of_each(falling), _first_of_each(rising))


def _first_of_each(mistakes: Sequence[Mistake]) -> tuple[Mistake, ...]:
    first: dict[str, Mistake] = {}
    for mistake in mistakes:
        first.setdefault(mistake.question, mistake)
    return tuple(first.values())[:WORST]
