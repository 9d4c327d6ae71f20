"""Comparison of the confidence rule with its baselines, majority vote and logprob rule, on the same questions.

A threshold is selected on one half of the questions and evaluated on the other, which avoids selection bias.
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
    """The confidence rule against a vote on the same ``n`` questions. difference: paired difference in accuracy.

    token_ratio: policy tokens of the rule over those of the vote. total_token_ratio: the same with the tokens that the
    generator read added to the rule (a plain vote needs no generator).
    """

    n: int
    accuracy: Interval
    vote_accuracy: Interval
    difference: Interval
    token_ratio: float
    total_token_ratio: float


@dataclass(frozen=True, slots=True)
class VoteSeconds:
    """Wall-clock seconds of the largest vote, with and without a generator that scores the samples."""

    scored: float | None
    plain: float | None


@dataclass(frozen=True, slots=True)
class VoteComparison:
    """The selected threshold against one vote.

    wall_ratio, wall_ratio_plain: wall-clock seconds of the confidence rule over those of the vote with and without a
    generator, at the same concurrency.
    """

    vote: str
    threshold: float
    budget: float
    reported: Versus
    all_questions: Versus
    wall_ratio: float | None
    wall_ratio_plain: float | None


@dataclass(frozen=True, slots=True)
class EqualTokens:
    """The logprob rule at one threshold, and the confidence curve at the same tokens per question.

    The curve interpolates linearly between thresholds, starting at ``single``; values beyond its ends are None.
    difference: at equal policy tokens. total_difference: with the generator's tokens added to the curve.
    """

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
    """Select the threshold on the questions where ``selects(index)``; evaluate it on the others and on all.

    curve: the confidence rule at its thresholds. budget: largest share of the vote's policy tokens that the selected
    threshold may spend. None if a half is empty.
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

    curve: at least two runs, including ``single`` if it was measured. The first row is the logprob threshold selected
    like the confidence threshold, on the reporting half; then every threshold on all questions.
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
    """The most accurate run on ``questions`` within ``budget`` times the vote's tokens; ties go to fewer tokens.

    Without a vote, or if no run is within the budget, all runs are candidates.
    """

    def merit(run: Run) -> tuple[float, float]:
        return float(np.mean(_correct(run, questions))), -float(np.mean(_tokens(run, questions)))

    allowed = budget * float(np.mean(_tokens(vote, questions))) if vote else float("inf")
    affordable = [run for run in curve if np.mean(_tokens(run, questions)) <= allowed]
    return max(affordable or curve, key=merit)


def answered_in_all(runs: Sequence[Run]) -> Questions:
    """Questions that every run answered; only these are compared."""
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
    """Outcomes of ``questions`` in question order."""
    return [outcome for outcome in run.outcomes if outcome.index in questions]


def _correct(run: Run, questions: Questions) -> list[float]:
    return [float(outcome.is_correct) for outcome in _chosen(run, questions)]


def _tokens(run: Run, questions: Questions) -> list[float]:
    return [float(outcome.policy_tokens) for outcome in _chosen(run, questions)]
