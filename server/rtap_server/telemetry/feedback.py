"""Were the answers right, and does confidence still mean what it meant: online calibration from users' feedback.

Remembers the confidence of recent answers by the id that the client saw, takes verdicts on them, and compares
first-cycle confidences with the distribution that was saved with the generator. Bounded, in memory, this process only.
A scrape reads the figures in a thread of its own: each is of a copy, which is made in one go.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rtap_core.artifact import bin_gaps, bin_of
from rtap_core.errors import InvalidRequest, UnknownRequest
from rtap_core.types import Policy, Trajectory

_LEAST_SHARE = 1e-4  # of an empty bin, so that one stray value does not make the index infinite


@dataclass(slots=True)
class Feedback:
    """Recent answers and the verdicts on them.

    reference: counts or shares of first-cycle confidences over equal-width bins of [0, 1]; empty when unknown.
    capacity: answers remembered. window: verdicts, and first-cycle confidences, that the figures are of.
    least: first-cycle confidences below which drift is not told.
    """

    reference: Sequence[float] = ()
    capacity: int = 10_000
    window: int = 1_000
    least: int = 100
    _answers: OrderedDict[tuple[bytes, str], dict[int, float | None]] = field(
        default_factory=OrderedDict[tuple[bytes, str], dict[int, float | None]]
    )
    _verdicts: OrderedDict[tuple[bytes, str, int], tuple[float, bool]] = field(
        default_factory=OrderedDict[tuple[bytes, str, int], tuple[float, bool]]
    )
    _firsts: deque[float] = field(default_factory=deque[float])

    def remember(self, request_id: str, trajectories: Mapping[int, Trajectory], owner: bytes = b"") -> None:
        """Keep the confidence of each returned answer (by choice); the oldest request is forgotten for it. owner: who
        alone may judge it."""
        self._answers[owner, request_id] = {choice: t.confidence for choice, t in trajectories.items()}
        while len(self._answers) > self.capacity:
            self._answers.popitem(last=False)
        for trajectory in trajectories.values():
            # Every sample of a vote is a first cycle.
            cycles = trajectory.cycles if trajectory.policy is Policy.VOTE else trajectory.cycles[:1]
            self._firsts.extend(c.confidence for c in cycles if c.confidence is not None)
        while len(self._firsts) > self.window:
            self._firsts.popleft()

    def judge(self, request_id: str, choice: int, *, correct: bool, owner: bytes = b"") -> float | None:
        """Take a verdict; a later one on the same answer replaces it. Returns the confidence that the answer had, None
        for an unscored one, which calibrates nothing.

        Raises UnknownRequest, or InvalidRequest for a choice that the request did not have."""
        answers = self._answers.get((owner, request_id))
        if answers is None:
            raise UnknownRequest(
                f"this server remembers no answer {request_id!r}: it keeps the last {self.capacity} since its start"
            )
        if choice not in answers:
            raise InvalidRequest(f"{request_id} has choices {sorted(answers)}, not {choice}", param="choice")
        confidence = answers[choice]
        if confidence is not None:
            self._verdicts[owner, request_id, choice] = (confidence, correct)
            while len(self._verdicts) > self.window:
                self._verdicts.popitem(last=False)
        return confidence

    @property
    def count(self) -> int:
        """Verdicts that the figures are of."""
        return len(self._verdicts)

    @property
    def brier(self) -> float:
        """Mean squared distance of confidence and outcome in [0, 1]; NaN without verdicts."""
        return _mean((confidence - correct) ** 2 for confidence, correct in tuple(self._verdicts.values()))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1] over equal-width bins; NaN without verdicts."""
        verdicts = tuple(self._verdicts.values())
        return sum(map(abs, bin_gaps(verdicts))) / len(verdicts) if verdicts else math.nan

    @property
    def drift(self) -> float:
        """Population stability index of recent first-cycle confidences against the reference: 0 for the same
        distribution, above 0.25 by convention another one. NaN while one of the two is unknown."""
        firsts = tuple(self._firsts)
        if not self.reference or len(firsts) < self.least:
            return math.nan
        counts = [0.0] * len(self.reference)
        for confidence in firsts:
            counts[bin_of(confidence, len(counts))] += 1
        pairs = zip(_shares(counts), _shares(self.reference), strict=True)
        return sum((now - then) * math.log(now / then) for now, then in pairs)


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [max(count / total, _LEAST_SHARE) for count in counts]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan
