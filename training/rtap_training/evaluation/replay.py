"""Stopping rules replayed on the kept samples of a vote, with the server's own decisions (``rtap_core``).

The figures of a question are means over ORDERS orders of its samples, so that chance in their order weighs less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from rtap_core.answers import answer_key
from rtap_core.stopping import choose, clears
from rtap_core.types import Cycle, Select
from rtap_core.voting import next_wave, rank
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Run, RunSpec
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, MAJORITY, SINGLE, WEIGHTED
from rtap_training.evaluation.statistics import Floats

ORDERS = 20
SCORED = (CGES, CONFIDENCE, WEIGHTED)
TEXT = " by text"  # texts are compared instead of the answers extracted from them


@dataclass(frozen=True, slots=True)
class RuleParameters:
    """Parameters of the rules. samples: sizes of votes; only the largest is drawn. vote_thresholds: of adaptive votes,
    the live one first. thresholds: of the confidence rule. budget: share of the majority's tokens that the chosen
    threshold may spend."""

    samples: Sequence[int]
    vote_thresholds: Sequence[float]
    thresholds: Sequence[float]
    budget: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A rule on the questions at positions ``indices`` of a task: share right, samples, tokens of the policy and of the
    generator, each by question. judged: None if unknown. spec: the rule. note: appended to its label."""

    spec: RunSpec
    indices: tuple[int, ...]
    right: Floats
    samples: Floats
    tokens: Floats
    judged: Floats | None
    note: str = ""

    @property
    def label(self) -> str:
        """Name for tables."""
        return self.spec.label + self.note


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as decisions read it. key, text_key: equal for equal answers and texts; None if it was cut.

    judged_tokens: that a generator read for its confidence."""

    cycle: Cycle
    key: str | None
    text_key: str | None
    is_right: bool
    judged_tokens: int


def figures_of(run: Run) -> Figures:
    """Figures of a run as it was answered by a server."""
    rows = [(o.is_correct, len(o.cycles), o.policy_tokens, o.generator_tokens) for o in run.answered]
    right, samples, tokens, judged = np.asarray(rows, dtype=np.float64).reshape(-1, 4).T
    return Figures(run.spec, tuple(outcome.index for outcome in run.answered), right, samples, tokens, judged)


def replay(vote: Run, questions: Sequence[Question], parameters: RuleParameters) -> list[Figures]:
    """Every rule that the samples of ``vote`` allow; those with confidences only if some answer has one. The confidence
    rule makes fresh attempts, at most as many as there are samples.

    Votes with an unscored answer count answers, as on the server; the label says in how many questions there is one."""
    kept, most = _kept(vote), vote.spec.samples or 1
    if not kept:
        return []
    complete = [[s.cycle for s in samples if s.cycle.answer is not None] for samples in kept.values()]
    is_scored = any(cycle.confidence is not None for cycles in complete for cycle in cycles)
    unscored = sum(any(cycle.confidence is None for cycle in cycles) for cycles in complete)
    # Log-probabilities cost no tokens; a server reports a generator's tokens by request, not by sample.
    scored = [c for o in vote.answered for c in o.cycles if c.confidence is not None]
    is_known = all(c.confidence_tokens is not None or c.logprobs is not None for c in scored)
    specs = [RunSpec(SINGLE)]
    if most > 1:
        rules = [(MAJORITY, ADAPTIVE), (WEIGHTED, CGES)] if is_scored else [(MAJORITY, ADAPTIVE)]
        sizes = sorted({size for size in (*parameters.samples, most) if 1 < size <= most})
        for plain, adaptive in rules:
            specs += [RunSpec(plain, samples=size) for size in sizes]
            specs += [RunSpec(adaptive, t, most) for t in sorted(parameters.vote_thresholds)]
        specs += [RunSpec(CONFIDENCE, t, most) for t in parameters.thresholds if is_scored]
    orders = {index: _orders(questions[index], samples) for index, samples in kept.items()}
    found = [_figures(spec, orders) for spec in specs]
    for i, one in enumerate(found):
        if one.spec.rule in SCORED:
            note = f" ({unscored} questions not fully scored)" if unscored else ""
            found[i] = replace(one, judged=one.judged if is_known else None, note=note)
    if most > 1 and any(sample.text_key != sample.key for samples in kept.values() for sample in samples):
        by_text = {i: [[replace(s, key=s.text_key) for s in order] for order in of] for i, of in orders.items()}
        found.append(replace(_figures(RunSpec(MAJORITY, samples=most), by_text), note=TEXT))
    return found


def majority_as_drawn(vote: Run) -> Figures | None:
    """The plain majority of all samples in the order in which they were drawn: what live runs compare with, whose
    samples have the same seeds."""
    kept = _kept(vote)
    if not kept:
        return None
    return _figures(RunSpec(MAJORITY, samples=vote.spec.samples), {index: [order] for index, order in kept.items()})


def outcome_of_rule(spec: RunSpec, samples: Sequence[Sample]) -> tuple[int | None, int]:
    """Position of the returned sample (None: no answer) and number of samples drawn, in the order given."""
    if spec.rule == SINGLE:
        return (None if samples[0].key is None else 0), 1
    if spec.rule == CONFIDENCE:
        cycles = [sample.cycle for sample in samples[: spec.samples]]
        drawn = next((i for i, cycle in enumerate(cycles, 1) if clears(cycle, spec.threshold or 0.0)), len(cycles))
        return choose(cycles[:drawn], Select.BEST), drawn
    most, threshold = spec.samples or len(samples), 1.0 if spec.threshold is None else spec.threshold
    keys = [sample.key for sample in samples]
    is_weighted = spec.rule in (CGES, WEIGHTED)
    confidences = [sample.cycle.confidence if is_weighted else None for sample in samples]
    drawn, ranked = 0, rank([], [])
    while size := next_wave(ranked, threshold, most - drawn):
        drawn += size
        ranked = rank(keys[:drawn], confidences[:drawn])
    return (ranked[0].first if ranked else None), drawn


def _figures(spec: RunSpec, orders: Mapping[int, Sequence[Sequence[Sample]]]) -> Figures:
    figures = [[_spent(spec, order) for order in of_question] for of_question in orders.values()]
    right, samples, tokens, judged = np.asarray(figures, dtype=np.float64).mean(axis=1).T
    return Figures(spec, tuple(orders), right, samples, tokens, judged)


def _spent(spec: RunSpec, order: Sequence[Sample]) -> tuple[float, ...]:
    """(is right, samples, tokens, judged tokens)"""
    selected, drawn = outcome_of_rule(spec, order)
    judged = sum(sample.judged_tokens for sample in order[:drawn]) if spec.rule in SCORED else 0
    is_right = selected is not None and order[selected].is_right
    return is_right, drawn, sum(sample.cycle.tokens for sample in order[:drawn]), judged


def _kept(vote: Run) -> dict[int, list[Sample]]:
    """Samples by question, of the questions that have all."""
    return {
        outcome.index: [_sample(i, cycle) for i, cycle in enumerate(outcome.cycles)]
        for outcome in vote.answered
        if len(outcome.cycles) == vote.spec.samples
    }


def _orders(question: Question, samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples in ORDERS random orders, which depend on the question alone."""
    rng = Random(question.seed(0))
    return [rng.sample(samples, len(samples)) for _ in range(ORDERS)]


def _sample(index: int, record: CycleRecord) -> Sample:
    text = record.answer if record.text is None else record.text
    is_cut = record.answer is None or text is None
    cost = (record.tokens, 0, 0, 0, 0, record.seconds, None, 0)
    cycle = Cycle(index, "", record.answer, record.confidence, False, *cost)
    key, text_key = (None, None) if is_cut else (answer_key(text or ""), " ".join((text or "").split()).casefold())
    return Sample(cycle, key, text_key, record.is_correct, record.confidence_tokens or 0)
