"""Rows of the result table: each rule against the plain majority of all samples, on the same questions.

A threshold is selected on the calibration half of the questions and judged on the other, which avoids selection bias.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rtap_training.evaluation import statistics as stats
from rtap_training.evaluation.replay import Figures
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
    """What rows are compared with. majority: of all samples. adaptive: curve of the adaptive vote, from one sample."""

    majority: Figures
    adaptive: Sequence[Figures]


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
