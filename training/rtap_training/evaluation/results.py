"""Results of an evaluation: each rule against the plain majority of all samples, on the same questions.

A threshold is selected on the calibration half of the questions and judged on the other, which avoids selection bias.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rtap_training.evaluation import statistics as stats
from rtap_training.evaluation.measurement import Judgement, Measurement, judge, measure
from rtap_training.evaluation.question_files import CALIBRATION, Question
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.replay import TEXT, Figures, RuleParameters, figures_of, majority_as_drawn, replay
from rtap_training.evaluation.rules import ADAPTIVE, CONFIDENCE, MAJORITY, SINGLE, VOTE
from rtap_training.evaluation.statistics import Floats, Interval

CHOSEN = " (chosen)"  # on the calibration half; the row is the other half


@dataclass(frozen=True, slots=True)
class Row:
    """A rule on ``n`` questions. samples: cycles or samples a question. is_live: answered by a server, not replayed.

    The rest compares with the plain majority of all samples on the same questions, None without one. difference: in
    accuracy. token_ratio: of policy tokens. total_token_ratio: with the tokens that the generator read added to the
    rule, None if unknown. wall_ratio: of seconds, to the live vote of all samples. at_equal_tokens: accuracy minus that
    of the adaptive vote at as many tokens; None beyond its curve.
    """

    label: str
    rule: str
    threshold: float | None
    size: int | None
    is_live: bool
    n: int
    accuracy: Interval
    samples: float
    tokens: Interval
    difference: Interval | None = None
    token_ratio: Interval | None = None
    total_token_ratio: float | None = None
    wall_ratio: Interval | None = None
    at_equal_tokens: Interval | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Baselines of every row. majority: of all samples. adaptive: curve of the adaptive vote, from one sample."""

    majority: Figures
    adaptive: Sequence[Figures]


@dataclass(frozen=True, slots=True)
class TaskResults:
    """All metrics of one task. rows: every rule, live and replayed. measurements: costs of the live runs.
    majority: label of the row that the others are compared with."""

    task: str
    n: int
    rows: tuple[Row, ...]
    measurements: tuple[Measurement, ...]
    judgement: Judgement | None
    majority: str | None
    budget: float


@dataclass(frozen=True, slots=True)
class Results:
    """All metrics. setting: their provenance (command, seed, concurrency, versions, date, …)."""

    setting: Mapping[str, Any]
    tasks: tuple[TaskResults, ...]

    @property
    def errors(self) -> int:
        """Number of failed requests over all runs."""
        return sum(m.errors for task in self.tasks for m in task.measurements)


def task_results(
    task: str, runs: Sequence[Run], questions: Sequence[Question], parameters: RuleParameters, *, is_kept: bool = False
) -> TaskResults:
    """Compute the metrics of one task from its runs. is_kept: they are kept samples, not answers of this evaluation."""
    vote = next((run for run in runs if run.spec.rule == VOTE), None)
    replayed = [] if vote is None else replay(vote, questions, parameters)
    reference = _reference(replayed)
    drawn = None if is_kept or vote is None else majority_as_drawn(vote)
    of_live = reference if reference is None or drawn is None else replace(reference, majority=drawn)
    live = [] if is_kept else [(figures_of(run), _wall_ratio(run, vote)) for run in runs]
    rows = [row_of(figures, of_live, is_live=True, wall_ratio=ratio) for figures, ratio in live]
    rows += [row_of(figures, reference, is_live=False) for figures in replayed]
    curves = [figures for figures, _ in live if figures.spec.rule == CONFIDENCE]
    curve = curves or [figures for figures in replayed if figures.spec.rule == CONFIDENCE]
    selecting = [index for index, question in enumerate(questions) if question.split == CALIBRATION]
    against = of_live if curves else reference
    chosen = choose_threshold(curve, against and against.majority, selecting, budget=parameters.budget)
    if chosen is not None:
        rows.append(row_of(chosen, against, is_live=bool(curves)))
    judged = vote or next((run for run in reversed(runs) if run.spec.rule == CONFIDENCE), None)
    return TaskResults(
        task=task,
        n=len(questions),
        rows=tuple(rows),
        measurements=() if is_kept else tuple(map(measure, runs)),
        judgement=None if judged is None else judge(judged, questions),
        majority=None if reference is None else reference.majority.label,
        budget=parameters.budget,
    )


def _reference(replayed: Sequence[Figures]) -> Reference | None:
    compared = [figures for figures in replayed if figures.note != TEXT]
    majorities = [figures for figures in compared if figures.spec.rule == MAJORITY]
    curve = [figures for figures in compared if figures.spec.rule in (SINGLE, ADAPTIVE)]
    return Reference(majorities[-1], curve) if majorities else None


def _wall_ratio(run: Run, vote: Run | None) -> Interval | None:
    """Seconds over those of the vote, of the rounds that both finished in the same session."""
    if vote is None:
        return None
    pairs = [
        (own.seconds, other.seconds)
        for own, other in zip(run.rounds, vote.rounds, strict=False)
        if own is not None and other is not None and own.session == other.session
    ]
    return stats.paired_ratio([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None


def row_of(figures: Figures, reference: Reference | None, *, is_live: bool, wall_ratio: Interval | None = None) -> Row:
    """The row of a rule, on the questions that the reference answered too."""
    if reference is not None:
        figures = restrict(figures, reference.majority.indices)
    row = Row(
        figures.label,
        figures.spec.rule,
        figures.spec.threshold,
        figures.spec.samples,
        is_live,
        len(figures.indices),
        _share(figures.right),
        float(figures.samples.mean()) if figures.indices else 0.0,
        stats.mean_interval(list(figures.tokens)),
        wall_ratio=wall_ratio,
    )
    if reference is None or not figures.indices:
        return row
    majority, spent = restrict(reference.majority, figures.indices), figures.judged
    total = None if spent is None else stats.paired_ratio(figures.tokens + spent, majority.tokens).value
    return replace(
        row,
        difference=stats.paired_difference(figures.right, majority.right),
        token_ratio=stats.paired_ratio(figures.tokens, majority.tokens),
        total_token_ratio=total,
        at_equal_tokens=_at_equal_tokens(figures, [restrict(one, figures.indices) for one in reference.adaptive]),
    )


def choose_threshold(
    curve: Sequence[Figures], majority: Figures | None, selecting: Collection[int], *, budget: float
) -> Figures | None:
    """The most accurate threshold on the questions ``selecting`` within ``budget`` times the majority's tokens, on the
    other questions. Ties go to fewer tokens; without a majority all are candidates.

    None if a half is empty or no threshold is within the budget."""
    compared = curve if majority is None else [*curve, majority]
    common = set.intersection(*(set(one.indices) for one in compared)) if curve else set[int]()
    on, off = common & set(selecting), common - set(selecting)
    if not on or not off:
        return None
    judged = [(one, restrict(one, on)) for one in curve]
    allowed = float("inf") if majority is None else budget * restrict(majority, on).tokens.mean()
    candidates = [pair for pair in judged if pair[1].tokens.mean() <= allowed]
    if not candidates:
        return None
    chosen, _ = max(candidates, key=lambda pair: (pair[1].right.mean(), -pair[1].tokens.mean()))
    return replace(restrict(chosen, off), note=chosen.note + CHOSEN)


def restrict(figures: Figures, indices: Collection[int]) -> Figures:
    """The figures on those questions only, in question order."""
    wanted = set(indices)
    at = [i for i, index in enumerate(figures.indices) if index in wanted]
    columns = {name: getattr(figures, name) for name in ("right", "samples", "tokens", "judged")}
    return replace(
        figures,
        indices=tuple(figures.indices[i] for i in at),
        **{name: None if column is None else column[at] for name, column in columns.items()},
    )


def _share(right: Floats) -> Interval:
    """Wilson's interval of a share of answers; of means over orders, a normal one."""
    if np.isin(right, (0.0, 1.0)).all():
        return stats.wilson_interval(int(right.sum()), len(right))
    mean = stats.mean_interval(list(right))
    return Interval(mean.value, max(mean.low, 0.0), min(mean.high, 1.0))


def _at_equal_tokens(figures: Figures, adaptive: Sequence[Figures]) -> Interval | None:
    if len(adaptive) < 2 or any(one.spec.rule == figures.spec.rule for one in adaptive):
        return None
    costs, gains = np.asarray([one.tokens for one in adaptive]), np.asarray([one.right for one in adaptive])
    return stats.equal_cost_difference(costs, gains, figures.tokens, figures.right)
