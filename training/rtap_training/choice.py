"""What a score is worth for choosing among k samples of a question: best of k, against majority vote of k.

Pure: samples in, shares of right choices out. Every question's samples are cut into as many groups of k as they give,
and the question is the unit of the bootstrap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtap_training.evaluation.statistics import Interval, majority, paired_difference

SIZES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Sample:
    """One first cycle. answer: None where it was cut; such a sample is never chosen before one with an answer.

    scores: by the name of the rule that gives them.
    """

    answer: str | None
    is_right: bool
    scores: Mapping[str, float]


def best(samples: Sequence[Sample], rule: str) -> bool:
    """Whether the sample with the highest score is right; the earliest of those tied."""
    answered = [s for s in samples if s.answer is not None]
    return bool(answered) and max(answered, key=lambda s: s.scores[rule]).is_right


def vote(samples: Sequence[Sample]) -> bool:
    """Whether the most frequent answer is right; the earliest of those tied."""
    winner = majority([s.answer for s in samples])
    return winner is not None and next(s.is_right for s in samples if s.answer == winner)


def compare(questions: Sequence[Sequence[Sample]], *, generator: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Shares of right choices with 95 % intervals for each k, and the generator's lead with its paired interval.

    The lead over the baselines is over the best of them *on these very questions*: that favours them.
    """
    num_samples = min(len(samples) for samples in questions)
    report: dict[str, Any] = {
        "questions": len(questions),
        "samples": num_samples,
        "single": _mean([_share([s.is_right for s in samples]) for samples in questions]),
        "any_right": _mean([float(any(s.is_right for s in samples)) for samples in questions]),
    }
    for k in (size for size in SIZES if size <= num_samples):
        groups = [[q[i : i + k] for i in range(0, len(q) - k + 1, k)] for q in questions]
        voted = [_share([vote(g) for g in gs]) for gs in groups]
        chosen = {
            rule: [_share([best(g, rule) for g in gs]) for gs in groups] for rule in (generator, *baselines)
        }  # fmt: skip
        strongest = max(baselines, key=lambda rule: sum(chosen[rule]))
        report[f"best_of_{k}"] = {rule: _mean(values) for rule, values in chosen.items()} | {
            "vote": _mean(voted),
            "best_baseline": strongest,
            "generator_minus_vote": _rounded(paired_difference(chosen[generator], voted)),
            "generator_minus_best_baseline": _rounded(paired_difference(chosen[generator], chosen[strongest])),
        }
    return report


def _share(rights: Sequence[bool]) -> float:
    return sum(rights) / len(rights)


def _mean(values: Sequence[float]) -> list[float]:
    return _rounded(paired_difference(values, [0.0] * len(values)))


def _rounded(interval: Interval) -> list[float]:
    """[value, low, high]."""
    return [round(x, 4) for x in (interval.value, interval.low, interval.high)]
