"""Best-of-k selection by a score, compared with a majority vote of k.

Pure functions. The samples of each question are split into groups of k; the bootstrap resamples questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtap_training.evaluation.statistics import Interval, majority, paired_difference

SIZES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Sample:
    """One first cycle.

    answer: None for a truncated cycle; a sample with an answer is always preferred. scores: by name of the rule.
    """

    answer: str | None
    is_right: bool
    scores: Mapping[str, float]


def best(samples: Sequence[Sample], rule: str) -> bool:
    """Return True if the sample with the highest score is right; the earliest sample wins a tie."""
    answered = [s for s in samples if s.answer is not None]
    return bool(answered) and max(answered, key=lambda s: s.scores[rule]).is_right


def vote(samples: Sequence[Sample]) -> bool:
    """Return True if the most frequent answer is right; the earliest answer wins a tie."""
    winner = majority([s.answer for s in samples])
    return winner is not None and next(s.is_right for s in samples if s.answer == winner)


def compare(questions: Sequence[Sequence[Sample]], *, generator: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Shares of right choices with 95 % intervals for each k, and the generator's lead with its paired interval.

    The best baseline is picked on the same questions, which favours the baselines.
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
