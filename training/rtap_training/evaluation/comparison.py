"""Set the confidence rule against its baselines on the same questions: majority vote, and the logprob rule.

A threshold is chosen on one half of the questions and judged on the other, so that the choice cannot flatter itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rtap_training.evaluation.records import Outcome, Run
from rtap_training.evaluation.statistics import (
    Interval,
    equal_cost_difference,
    interpolate,
    paired_difference,
    wilson_interval,
)


@dataclass(frozen=True, slots=True)
class Versus:
    """The confidence rule against a vote on the same ``n`` questions. difference: in accuracy, paired.

    token_ratio: policy tokens of the rule over those of the vote; total_token_ratio: the same with everything that
    the generator read added to the rule's side (a plain vote needs no generator).
    """

    n: int
    accuracy: Interval
    vote_accuracy: Interval
    difference: Interval
    token_ratio: float
    total_token_ratio: float


@dataclass(frozen=True, slots=True)
class VoteSeconds:
    """Wall-clock seconds of the largest vote on a server whose generator scores its samples, and on one without."""

    scored: float | None
    plain: float | None


@dataclass(frozen=True, slots=True)
class VoteComparison:
    """Best threshold against one vote. wall_ratio, wall_ratio_plain: wall-clock seconds of the confidence rule over
    those of the vote with and without a generator (see VoteSeconds), at the same concurrency."""

    vote: str
    threshold: float
    budget: float
    reported: Versus
    all_questions: Versus
    wall_ratio: float | None
    wall_ratio_plain: float | None


@dataclass(frozen=True, slots=True)
class EqualTokens:
    """The logprob rule at one of its thresholds, and the confidence curve (straight lines between its thresholds,
    from ``single`` on) at the same tokens per question; None where that is beyond the curve's ends.

    difference: at equal policy tokens. total_difference: the same with all that the generator read counted as the
    curve's own tokens."""

    threshold: float
    is_chosen: bool
    n: int
    tokens: float
    accuracy: float
    curve_accuracy: float | None
    difference: Interval | None
    total_difference: Interval | None


Questions = frozenset[int]  # positions of questions in their task


def compare_with_vote(
    curve: Sequence[Run], vote: Run, selects: Callable[[int], bool], *, budget: float, seconds: VoteSeconds
) -> VoteComparison | None:
    """Choose the threshold on the questions where ``selects(index)``, report on the others and on all.

    curve: the confidence rule at its thresholds. budget: the chosen one may spend at most this share of the vote's
    policy tokens. None if a half is empty.
    """
    common = answered_in_all([*curve, vote])
    selecting = frozenset(filter(selects, common))
    reporting = common - selecting
    if not selecting or not reporting:
        return None
    chosen = choose_threshold(curve, vote, selecting, budget=budget)
    return VoteComparison(
        vote=vote.spec.label,
        threshold=chosen.spec.threshold or 0.0,
        budget=budget,
        reported=_versus(chosen, vote, reporting),
        all_questions=_versus(chosen, vote, common),
        wall_ratio=_ratio(chosen.wall_seconds, seconds.scored),
        wall_ratio_plain=_ratio(chosen.wall_seconds, seconds.plain),
    )


def compare_with_logprob(
    curve: Sequence[Run], rules: Sequence[Run], vote: Run | None, selects: Callable[[int], bool], *, budget: float
) -> tuple[EqualTokens, ...]:
    """The confidence curve at the tokens of each logprob threshold.

    curve: at least two runs, ``single`` among them if there is one. The logprob threshold chosen the same way as the
    confidence threshold (against ``vote``) comes first, judged on the reporting half; then all, on all questions.
    """
    if not rules or len(curve) < 2:
        return ()
    common = answered_in_all([*curve, *rules, *([vote] if vote else [])])
    selecting = frozenset(filter(selects, common))
    if not selecting or selecting == common:
        return ()
    chosen = choose_threshold(rules, vote, selecting, budget=budget)
    rows = (_equal_tokens(curve, rule, common, is_chosen=False) for rule in rules)
    return (_equal_tokens(curve, chosen, common - selecting, is_chosen=True), *rows)


def choose_threshold(curve: Sequence[Run], vote: Run | None, questions: Questions, *, budget: float) -> Run:
    """The most accurate run on ``questions`` among those within ``budget`` times the vote's tokens (among all if
    none is, or without a vote); of equals the one with fewest tokens."""

    def merit(run: Run) -> tuple[float, float]:
        return float(np.mean(_correct(run, questions))), -float(np.mean(_tokens(run, questions)))

    allowed = budget * float(np.mean(_tokens(vote, questions))) if vote else float("inf")
    affordable = [run for run in curve if np.mean(_tokens(run, questions)) <= allowed]
    return max(affordable or curve, key=merit)


def answered_in_all(runs: Sequence[Run]) -> Questions:
    """Questions that every run answered: only those can be compared."""
    common = frozenset(outcome.index for outcome in runs[0].answered)
    for run in runs[1:]:
        common &= {outcome.index for outcome in run.answered}
    return common


def _versus(run: Run, vote: Run, questions: Questions) -> Versus:
    correct, vote_correct = _correct(run, questions), _correct(vote, questions)
    tokens, vote_tokens = sum(_tokens(run, questions)), sum(_tokens(vote, questions))
    generator_tokens = sum(outcome.generator_tokens for outcome in _chosen(run, questions))
    return Versus(
        n=len(questions),
        accuracy=wilson_interval(int(sum(correct)), len(questions)),
        vote_accuracy=wilson_interval(int(sum(vote_correct)), len(questions)),
        difference=paired_difference(correct, vote_correct),
        token_ratio=tokens / max(vote_tokens, 1),
        total_token_ratio=(tokens + generator_tokens) / max(vote_tokens, 1),
    )


def _equal_tokens(curve: Sequence[Run], rule: Run, questions: Questions, *, is_chosen: bool) -> EqualTokens:
    costs = np.asarray([_tokens(run, questions) for run in curve], dtype=np.float64)
    judged = np.asarray([[o.generator_tokens for o in _chosen(run, questions)] for run in curve], dtype=np.float64)
    gains = np.asarray([_correct(run, questions) for run in curve], dtype=np.float64)
    tokens, correct = _tokens(rule, questions), _correct(rule, questions)
    mean_tokens = float(np.mean(tokens))
    return EqualTokens(
        threshold=rule.spec.threshold or 0.0,
        is_chosen=is_chosen,
        n=len(questions),
        tokens=mean_tokens,
        accuracy=float(np.mean(correct)),
        curve_accuracy=interpolate(mean_tokens, list(costs.mean(axis=1)), list(gains.mean(axis=1))),
        difference=equal_cost_difference(costs, gains, tokens, correct),
        total_difference=equal_cost_difference(costs + judged, gains, tokens, correct),
    )


def _ratio(seconds: float | None, other: float | None) -> float | None:
    return seconds / other if seconds and other else None


def _chosen(run: Run, questions: Questions) -> list[Outcome]:
    """Outcomes of ``questions`` in question order, the same order for every run."""
    return [outcome for outcome in run.outcomes if outcome.index in questions]


def _correct(run: Run, questions: Questions) -> list[float]:
    return [float(outcome.is_correct) for outcome in _chosen(run, questions)]


def _tokens(run: Run, questions: Questions) -> list[float]:
    return [float(outcome.policy_tokens) for outcome in _chosen(run, questions)]
