"""Results of an evaluation, task by task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from rtap_training.evaluation.comparison import (
    EqualTokens,
    VoteComparison,
    VoteSeconds,
    compare_with_logprob,
    compare_with_vote,
)
from rtap_training.evaluation.judgement import Judgement, judge
from rtap_training.evaluation.measurement import ConfidenceQuality, Measurement, confidence_quality, measure
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import Run
from rtap_training.evaluation.rules import CONFIDENCE, GENERATOR, LOGPROB, OWN_SERVER, SINGLE, VOTE


@dataclass(frozen=True, slots=True)
class TaskResults:
    """All metrics of one task."""

    task: str
    measurements: tuple[Measurement, ...]
    quality: tuple[ConfidenceQuality, ...]
    versus_vote: tuple[VoteComparison, ...]
    versus_logprob: tuple[EqualTokens, ...]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """All metrics. setting: their provenance (command, seed, concurrency, versions, date, …)."""

    setting: Mapping[str, Any]
    tasks: tuple[TaskResults, ...]

    @property
    def errors(self) -> int:
        """Number of failed requests over all runs."""
        return sum(m.errors for task in self.tasks for m in task.measurements if m.wall_seconds is not None)

    def as_json(self) -> dict[str, Any]:
        """JSON values; NaN and infinity become null."""
        return cast(dict[str, Any], _jsonable(asdict(self)))


def task_results(
    task: str, runs: Sequence[Run], questions: Sequence[Question], samples: Sequence[int], *, budget: float
) -> TaskResults:
    """Compute the metrics of one task from its runs. budget: see ``compare_with_vote``."""
    votes = {run.spec.scored_by: run for run in runs if run.spec.rule == VOTE}
    vote, plain_vote = votes.get(GENERATOR), votes.get(LOGPROB)
    sampled = next((votes[kind] for kind in (GENERATOR, *OWN_SERVER) if kind in votes), None)
    majorities = [_own_majority(sampled, size) for size in sorted(samples)] if sampled else []
    curve = _thresholds(runs, CONFIDENCE)

    def selects(index: int) -> bool:
        return questions[index].is_for_selection

    opponents = [*majorities[-1:], *([vote] if vote else [])] if curve else []
    seconds = VoteSeconds(vote.wall_seconds if vote else None, plain_vote.wall_seconds if plain_vote else None)
    versus_vote = [compare_with_vote(curve, other, selects, budget=budget, seconds=seconds) for other in opponents]
    full_curve = [*(run for run in runs if run.spec.rule == SINGLE), *curve]
    quality = [confidence_quality(run, source) for source, run in votes.items()]
    return TaskResults(
        task=task,
        measurements=tuple(measure(run) for run in [*runs, *majorities]),
        quality=tuple(q for q in quality if q is not None),
        versus_vote=tuple(c for c in versus_vote if c is not None),
        versus_logprob=compare_with_logprob(
            full_curve,
            _thresholds(runs, LOGPROB),
            majorities[-1] if majorities else None,
            selects,
            budget=budget,
        ),
        judgements=_judgements(runs, votes, questions),
    )


def _judgements(runs: Sequence[Run], votes: Mapping[str, Run], questions: Sequence[Question]) -> tuple[Judgement, ...]:
    """Judgements of every vote; without a generator vote, of the confidence rule at its highest threshold."""
    sources = dict(votes)
    curve = _thresholds(runs, CONFIDENCE)
    if GENERATOR not in sources and curve:
        sources[GENERATOR] = curve[-1]
    found = (judge(run, source, questions) for source, run in sources.items())
    return tuple(judgement for judgement in found if judgement is not None)


def _own_majority(vote: Run, size: int) -> Run:
    majority = vote.majority_of(size)
    return replace(
        majority, spec=replace(majority.spec, scored_by=GENERATOR)
    )  # samples do not depend on who scores them


def _thresholds(runs: Sequence[Run], rule: str) -> list[Run]:
    """Runs of a thresholded rule, lowest threshold first."""
    return sorted((run for run in runs if run.spec.rule == rule), key=lambda run: run.spec.threshold or 0.0)


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in cast(dict[object, object], value).items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in cast(Sequence[object], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
