"""Metrics of a run: accuracy, cost, recursion, and quality of the confidence with its largest errors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rtap_training.evaluation import statistics as stats
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Run, RunSpec
from rtap_training.evaluation.rules import ADAPTIVE, CGES, VOTE
from rtap_training.evaluation.statistics import Bin, Interval, WithinQuestion

NUM_BINS = 10  # of the plotted curve; the calibration error uses other bins
WORST = 8  # answers kept of each kind


@dataclass(frozen=True, slots=True)
class Measurement:
    """Metrics of one run over its ``n`` answered requests; only ``errors`` counts failed ones. stop_reasons,
    error_messages: counts.

    costs: by name, None if unknown. Tokens and cycles are means per question; seconds and rate are at the run's
    concurrency, unknown if a round was interrupted. recomputed_per_later_cycle, most_recomputed: prompt tokens of
    cycles after the first that were not cached. unanswered: questions without an answer, which count as wrong.
    """

    spec: RunSpec
    n: int
    errors: int
    accuracy: Interval
    policy_tokens: Interval
    costs: Mapping[str, float | None]
    stop_reasons: Mapping[str, int]
    error_messages: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Mistake:
    """A misjudged answer. expected: the reference, which may be one of several right answers."""

    question: str
    answer: str
    expected: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """Quality of the confidence over all scored answers of one run. rule: label of the run.

    within, auroc: None without contrast, and for a run that stops by confidence, which selects its answers. best_of:
    accuracy of each question's most confident answer. ceiling: share of questions with a right answer. surely_wrong:
    wrong answers, highest confidence first. hardly_right: right answers, lowest confidence first. At most one answer
    per question in each.
    """

    rule: str
    answers: int
    share_right: float
    within: WithinQuestion | None
    auroc: float | None
    ece: float
    brier: float
    best_of: Interval
    ceiling: Interval
    bins: tuple[Bin, ...]
    surely_wrong: tuple[Mistake, ...]
    hardly_right: tuple[Mistake, ...]


def measure(run: Run) -> Measurement:
    """Compute the metrics of one run."""
    answered, n = run.answered, len(run.answered)
    cycles = [cycle for outcome in answered for cycle in outcome.cycles]
    oops, tokens = sum(c.oops_tokens for c in cycles), sum(outcome.policy_tokens for outcome in answered)
    first_answers = [o.first_answer_seconds for o in answered if o.first_answer_seconds is not None]
    is_vote = run.spec.rule in (VOTE, ADAPTIVE, CGES)
    later = [c for outcome in answered for c in outcome.cycles[1:] if c.cached_tokens is not None and not is_vote]
    recomputed = [c.prompt_tokens - (c.cached_tokens or 0) for c in later]
    costs: dict[str, float | None] = {
        "generator_tokens": sum(outcome.generator_tokens for outcome in answered) / max(n, 1),
        "wall_seconds": run.wall_seconds,
        "questions_per_second": n / run.wall_seconds if run.wall_seconds else None,
        "median_seconds": median(o.seconds for o in answered) if run.wall_seconds is not None and n else None,
        "median_first_answer_seconds": median(first_answers) if first_answers else None,
        "cycles": len(cycles) / max(n, 1),
        "oops_tokens": oops / max(n, 1),
        "oops_per_1000_tokens": 1000 * oops / max(tokens, 1),
        "cached_prompt_tokens": sum(c.cached_tokens or 0 for c in cycles) / max(n, 1),
        "recomputed_prompt_tokens": sum(c.prompt_tokens - (c.cached_tokens or 0) for c in cycles) / max(n, 1),
        "recomputed_per_later_cycle": fmean(recomputed) if recomputed else None,
        "most_recomputed": max(recomputed, default=None),
        "unanswered": sum(outcome.answer is None for outcome in answered),
        "degraded": sum(outcome.degraded is not None for outcome in answered),
    }
    return Measurement(
        spec=run.spec,
        n=n,
        errors=len(run.outcomes) - n,
        accuracy=stats.wilson_interval(sum(outcome.is_correct for outcome in answered), n),
        policy_tokens=stats.mean_interval([outcome.policy_tokens for outcome in answered]),
        costs=costs,
        stop_reasons=dict(sorted(Counter(outcome.stop_reason for outcome in answered).items())),
        error_messages=dict(Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
    )


def judge(run: Run, questions: Sequence[Question]) -> Judgement | None:
    """Quality of a run's confidence; None if no answer has one."""
    scored = [
        (outcome.index, cycle)
        for outcome in run.answered
        for cycle in outcome.cycles
        if cycle.answer is not None and cycle.confidence is not None
    ]
    if not scored:
        return None
    rising = sorted(scored, key=lambda one: one[1].confidence or 0.0)
    falling = sorted(scored, key=lambda one: -(one[1].confidence or 0.0))
    asked, scores = [index for index, _ in scored], [cycle.confidence or 0.0 for _, cycle in scored]
    labels, n, is_vote = [cycle.is_correct for _, cycle in scored], len(run.answered), run.spec.rule == VOTE
    best = {index: cycle.is_correct for index, cycle in reversed(falling)}  # the most confident one comes last
    return Judgement(
        rule=run.spec.label,
        answers=len(scored),
        share_right=sum(labels) / len(labels),
        within=stats.within_question_auroc(asked, scores, labels) if is_vote else None,
        auroc=stats.global_auroc(scores, labels) if is_vote else None,
        ece=stats.expected_calibration_error(scores, labels),
        brier=stats.brier(scores, labels),
        best_of=stats.wilson_interval(sum(best.values()), n),
        ceiling=stats.wilson_interval(sum(any(c.is_correct for c in outcome.cycles) for outcome in run.answered), n),
        bins=tuple(stats.reliability_bins(scores, labels, bins=NUM_BINS)),
        surely_wrong=_mistakes([one for one in falling if not one[1].is_correct], questions),
        hardly_right=_mistakes([one for one in rising if one[1].is_correct], questions),
    )


def _mistakes(found: Sequence[tuple[int, CycleRecord]], questions: Sequence[Question]) -> tuple[Mistake, ...]:
    """The first answers, one per question."""
    first = {index: cycle for index, cycle in reversed(found)}
    order = list(dict.fromkeys(index for index, _ in found))[:WORST]
    return tuple(
        Mistake(questions[i].text, first[i].answer or "", questions[i].answer, first[i].confidence or 0.0)
        for i in order
    )
