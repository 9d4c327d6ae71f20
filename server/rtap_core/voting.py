"""Vote over the samples of one question: candidates, posterior of the leader, size of the next wave. Pure.

Without confidences the posterior is that of counts (Adaptive-Consistency, Aggarwal et al., EMNLP 2023). With them it is
that of candidate answers given each sample's confidence (CGES, arXiv 2511.02603).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from rtap_core.answers import answer_key
from rtap_core.types import Cycle

# Default thresholds, measured on a real model (docs/real-models.md). Two samples that agree reach the first.
COUNT_THRESHOLD = 0.85
CONFIDENCE_THRESHOLD = 0.95
_CLIP = 1e-6  # confidences of exactly 0 or 1 would decide a vote alone


@dataclass(frozen=True, slots=True)
class Candidate:
    """A distinct answer.

    first: position of the first cycle that has it. votes: number of its samples. weight: sum of their confidences, or
    ``votes`` without confidences. posterior: probability that it is right (with confidences), or that it is the most
    frequent answer of the model (without)."""

    first: int
    votes: int
    weight: float
    posterior: float


def candidates(cycles: Sequence[Cycle]) -> list[Candidate]:
    """Distinct complete answers, the leader first (``rank``)."""
    keys = [None if cycle.answer is None else answer_key(cycle.answer) for cycle in cycles]
    return rank(keys, [cycle.confidence for cycle in cycles])


def rank(keys: Sequence[str | None], confidences: Sequence[float | None]) -> list[Candidate]:
    """Candidates of samples with these answer keys (None: incomplete), the leader first: by weight, a tie goes to the
    answer seen first.

    Confidences count only if every complete answer has one."""
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(i)
    is_scored = all(confidences[i] is not None for group in groups.values() for i in group)
    scores = [[confidences[i] or 0.0 for i in group] if is_scored else [1.0] * len(group) for group in groups.values()]
    ordered = sorted(zip(groups.values(), scores, strict=True), key=lambda pair: (-sum(pair[1]), pair[0][0]))
    if is_scored:
        posteriors = _posteriors_of_confidences([of_group for _, of_group in ordered])
    else:
        posteriors = _posteriors_of_counts([len(group) for group, _ in ordered])
    return [Candidate(g[0], len(g), sum(w), p) for (g, w), p in zip(ordered, posteriors, strict=True)]


def majority(cycles: Sequence[Cycle]) -> int | None:
    """Position of the first cycle with the leading answer; None if no answer is complete."""
    ranked = candidates(cycles)
    return ranked[0].first if ranked else None


def next_wave(ranked: Sequence[Candidate], threshold: float, samples_left: int) -> int:
    """Samples to draw next; 0 when the vote ends: its leader is certain enough, or no samples are left."""
    return 0 if is_decided(ranked, threshold, samples_left) else wave_size(ranked, threshold, samples_left)


@cache
def count_posterior(leader: int, second: int) -> float:
    """P(leader is drawn more often than second), given how often each was drawn, with a uniform prior.

    The tail of a Beta(leader + 1, second + 1) distribution above 1/2, by its binomial sum."""
    draws = leader + second + 1
    return sum(math.comb(draws, k) for k in range(leader + 1)) / 2**draws


def is_decided(ranked: Sequence[Candidate], threshold: float, samples_left: int) -> bool:
    """True if the leader's posterior reaches ``threshold``, or no further samples could change the majority.

    A threshold of 1 draws all samples."""
    if not ranked or threshold >= 1:
        return False
    leader, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    is_count = leader.weight == leader.votes
    lead = leader.votes - (second.votes if second is not None else 0)
    return leader.posterior >= threshold or (is_count and lead > samples_left)


def wave_size(ranked: Sequence[Candidate], threshold: float, samples_left: int) -> int:
    """Samples to draw next: the fewest with which the leader's count could reach ``threshold``, at most
    ``samples_left``. A threshold of 1 is never reached, so all samples are drawn at once."""
    if threshold >= 1:
        return samples_left
    leader, second = (*(one.votes for one in ranked), 0, 0)[:2]
    size = min(1, samples_left)
    while size < samples_left and count_posterior(leader + size, second) < threshold:
        size += 1
    return size


def _posteriors_of_counts(votes: Sequence[int]) -> list[float]:
    """Of each candidate against its strongest rival."""
    rivals = [max((v for j, v in enumerate(votes) if j != i), default=0) for i in range(len(votes))]
    return [count_posterior(own, rival) for own, rival in zip(votes, rivals, strict=True)]


def _posteriors_of_confidences(groups: Sequence[Sequence[float]]) -> list[float]:
    """P(candidate is right): a sample is right with its confidence, else it has any other answer with equal chance.

    The hypotheses are the candidates, and that none of them is right. One sample's posterior is its confidence."""

    def log_odds(confidence: float) -> float:
        clipped = min(max(confidence, _CLIP), 1 - _CLIP)
        return math.log(clipped / (1 - clipped)) + math.log(len(groups))

    scores = [sum(map(log_odds, group)) for group in groups]
    highest = max([*scores, 0.0])
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights) + math.exp(-highest)
    return [weight / total for weight in weights]
