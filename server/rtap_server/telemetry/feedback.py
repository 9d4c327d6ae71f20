"""Online calibration of confidence from user feedback, and its drift from the generator's reference distribution.

Remembers the confidence of recent answers by response id. Bounded, in memory, this process only. Prometheus scrapes
from another thread, so each figure is computed from a copy.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rtap_core.artifact import bin_gaps, bin_of
from rtap_core.errors import InvalidRequest, UnknownRequest
from rtap_core.types import Policy, Trajectory

_LEAST_SHARE = 1e-4  # of an empty bin, so that the index stays finite


@dataclass(slots=True)
class Feedback:
    """Recent answers and the users' verdicts on them.

    reference: counts or shares of first-cycle confidences over equal-width bins of [0, 1]; empty when unknown.
    capacity: answers remembered. window: verdicts, and first-cycle confidences, in the figures.
    least: number of first-cycle confidences below which drift is NaN.
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
        """Remember the confidence of each returned answer by choice; forget the oldest request. owner: the API key
        whose feedback is accepted."""
        self._answers[owner, request_id] = {choice: t.confidence for choice, t in trajectories.items()}
        while len(self._answers) > self.capacity:
            self._answers.popitem(last=False)
        for trajectory in trajectories.values():
            # Each sample of a vote is a first cycle.
            cycles = trajectory.cycles if trajectory.policy is Policy.VOTE else trajectory.cycles[:1]
            self._firsts.extend(c.confidence for c in cycles if c.confidence is not None)
        while len(self._firsts) > self.window:
            self._firsts.popleft()

    def judge(self, request_id: str, choice: int, *, correct: bool, owner: bytes = b"") -> float | None:
        """Record a verdict, replacing an earlier one on the same answer. Returns the answer's confidence; None for an
        answer without a score, which is not counted.

        Raises UnknownRequest, or InvalidRequest for a choice that the request did not have."""
        answers = self._answers.get((owner, request_id))
        if answers is None:
            raise UnknownRequest(f"no answer {request_id!r} is known: this server remembers the last {self.capacity}")
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
        """Verdicts in the figures."""
        return len(self._verdicts)

    @property
    def brier(self) -> float:
        """Brier score: mean squared distance of confidence and outcome, in [0, 1]; NaN without verdicts."""
        return _mean((confidence - correct) ** 2 for confidence, correct in tuple(self._verdicts.values()))

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1] over equal-width bins; NaN without verdicts."""
        verdicts = tuple(self._verdicts.values())
        return sum(map(abs, bin_gaps(verdicts))) / len(verdicts) if verdicts else math.nan

    @property
    def drift(self) -> float:
        """Population stability index of recent first-cycle confidences against the reference; NaN while unknown.

        0: the same distribution; above 0.25, by convention: a different one."""
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
