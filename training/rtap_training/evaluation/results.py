"""Results of an evaluation, task by task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rtap_training.evaluation.comparison import Reference, Row, choose_threshold, row_of
from rtap_training.evaluation.measurement import Judgement, Measurement, judge, measure
from rtap_training.evaluation.question_files import CALIBRATION, Question
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.replay import TEXT, Figures, RuleParameters, figures_of, majority_as_drawn, replay
from rtap_training.evaluation.rules import ADAPTIVE, CONFIDENCE, MAJORITY, SINGLE, VOTE
from rtap_training.evaluation.statistics import Interval, paired_ratio


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
    return paired_ratio([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None
