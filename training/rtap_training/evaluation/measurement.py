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
    """Metrics of one run over its ``n`` answered requests; only ``errors`` counts failed ones.

    Tokens, cycles and Oops tokens are means per question. wall_seconds, questions_per_second: at the run's
    concurrency, None if a round was interrupted. later_recomputed_*: uncached prompt tokens of
    cycles after the first; None without such cycles or if the server does not report them. unanswered: questions
    without an answer, which count as wrong. stop_reasons, error_messages: counts.
    """

    spec: RunSpec
    n: int
    errors: int
    accuracy: Interval
    policy_tokens: Interval
    generator_tokens: float
    wall_seconds: float | None
    questions_per_second: float | None
    median_seconds: float | None
    median_first_answer_seconds: float | None
    cycles: float
    oops_tokens: float
    oops_per_1000_tokens: float
    cached_prompt_tokens: float
    recomputed_prompt_tokens: float
    later_recomputed_mean: float | None
    later_recomputed_max: int | None
    unanswered: int
    degraded: int
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
    answered = run.answered
    n = len(answered)
    cycles = [cycle for outcome in answered for cycle in outcome.cycles]
    tokens = sum(outcome.policy_tokens for outcome in answered)
    oops = sum(cycle.oops_tokens for cycle in cycles)
    first_answers = [o.first_answer_seconds for o in answered if o.first_answer_seconds is not None]
    timed = run.wall_seconds is not None
    later = [] if run.spec.rule in (VOTE, ADAPTIVE, CGES) else [c for outcome in answered for c in outcome.cycles[1:]]
    later_recomputed = [c.prompt_tokens - c.cached_tokens for c in later if c.cached_tokens is not None]
    return Measurement(
        spec=run.spec,
        n=n,
        errors=len(run.outcomes) - n,
        accuracy=stats.wilson_interval(sum(outcome.is_correct for outcome in answered), n),
        policy_tokens=stats.mean_interval([outcome.policy_tokens for outcome in answered]),
        generator_tokens=_per(sum(outcome.generator_tokens for outcome in answered), n),
        wall_seconds=run.wall_seconds,
        questions_per_second=n / run.wall_seconds if run.wall_seconds else None,
        median_seconds=median(o.seconds for o in answered) if timed and answered else None,
        median_first_answer_seconds=median(first_answers) if first_answers else None,
        cycles=_per(len(cycles), n),
        oops_tokens=_per(oops, n),
        oops_per_1000_tokens=1000 * _per(oops, tokens),
        cached_prompt_tokens=_per(sum(c.cached_tokens or 0 for c in cycles), n),
        recomputed_prompt_tokens=_per(sum(c.prompt_tokens - (c.cached_tokens or 0) for c in cycles), n),
        later_recomputed_mean=fmean(later_recomputed) if later_recomputed else None,
        later_recomputed_max=max(later_recomputed, default=None),
        unanswered=sum(outcome.answer is None for outcome in answered),
        degraded=sum(outcome.degraded is not None for outcome in answered),
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


def _per(total: float, n: int) -> float:
    return total / n if n else 0.0
