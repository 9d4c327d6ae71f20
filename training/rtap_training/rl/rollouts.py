"""Recursive rollouts: trajectories cut after the first right cycle (R-TAP alg. 1), one training row each.

The cut is the server's stop rule with an answer checker as generator: confidence 1 for a right answer, 0 for a wrong
one, threshold 1. Rows are token ids throughout and never re-tokenised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtap_core.features import LogprobFeatures, logprob_features
from rtap_core.format import TrajectoryFormat, parse_cycle
from rtap_core.recursion import CycleEvent, DraftEvent, FinalEvent, Recursion, StepEvent
from rtap_core.types import Judged, Limits, Policy, Score
from rtap_training.rl.lockstep import Generate, Lockstep, RowEngine, in_lockstep


@dataclass(frozen=True, slots=True)
class RolloutQuestion:
    """A question for a rollout. question: identifier. check: answer -> True if right."""

    question: str
    prompt_ids: list[int]
    check: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Trajectory format in a policy's tokens, and its chat template.

    render: messages -> prompt, up to where the policy writes.
    end_of_turn_id: appended after a right answer. cycle_end_ids: tokens that end a cycle but not the turn.
    """

    format: TrajectoryFormat
    end_of_turn_id: int
    end_of_turn_ids: frozenset[int]
    cycle_end_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], list[int]]
    count_oops: Callable[[str], int]
    render: Callable[[Sequence[Mapping[str, Any]]], str]


@dataclass(frozen=True, slots=True)
class RolledCycle:
    """One kept cycle.

    ids: input of a generator; the end tag of the answer is added if the policy ended its turn without it. answer: None
    if truncated. logprobs: features of the sampled tokens; None if the sampler returns no log-probabilities.
    """

    ids: tuple[int, ...]
    text: str
    answer: str | None
    is_right: bool
    oops_tokens: int
    logprobs: LogprobFeatures | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One training row.

    completion_ids (T,): all cycles, and the end of turn after a right one. is_boundary (T,): tokens set by the loop
    rather than sampled: the end tag of an answer that ended with the turn, the opening of a further cycle, and the end
    of turn. logps (T,): from the sampler, NaN at boundaries; None if the sampler returns none.
    """

    question: str
    prompt_ids: list[int]
    completion_ids: list[int]
    is_boundary: list[bool]
    logps: list[float] | None
    cycles: tuple[RolledCycle, ...]

    @property
    def is_right(self) -> bool:
        """True if the last kept cycle is right."""
        return self.cycles[-1].is_right


@dataclass(frozen=True, slots=True)
class Checker:
    """The answer checker as ``rtap_core.types.Confidence``: 1 for a right answer, 0 for a wrong one."""

    asked: RolloutQuestion
    dialect: Dialect

    async def score(self, judged: Judged) -> Score:
        """Never raises ConfidenceError."""
        text = self.dialect.decode(judged.cycle_token_ids)
        _, answer = parse_cycle(text, self.dialect.format, ended_by_model=True)
        return Score(float(answer is not None and self.asked.check(answer)))


def roll_out(
    asked: Sequence[RolloutQuestion],
    generate: Generate,
    dialect: Dialect,
    *,
    max_cycles: int,
    max_tokens: int,
    max_cycle_tokens: int | None,
) -> list[Rollout]:
    """One rollout per entry of ``asked``, in order; the caller repeats questions."""
    limits = Limits(policy=Policy.CONFIDENCE, threshold=1.0, max_cycles=max_cycles, max_tokens=max_tokens)

    async def follow(lockstep: Lockstep, row: int) -> Rollout:
        engine = RowEngine(
            lockstep, row, dialect.end_of_turn_ids | dialect.cycle_end_ids, dialect.end_of_turn_ids,
            dialect.decode, dialect.encode, max_cycle_tokens,
        )  # fmt: skip
        checker = Checker(asked[row], dialect)
        # A row is one sequence, so no cycle starts again on the question alone.
        recursion = Recursion(engine, dialect.format, checker, dialect.count_oops, falls_back=False)
        return await _collect(asked[row], recursion, limits, dialect)

    return in_lockstep(generate, len(asked), follow)


async def _collect(asked: RolloutQuestion, recursion: Recursion, limits: Limits, dialect: Dialect) -> Rollout:
    """Collect the tokens of one trajectory, and which of them are boundaries."""
    row = _Row(dialect)
    cycles: list[RolledCycle] = []
    sampled: list[tuple[int, float]] = []
    closing = tuple(dialect.encode(dialect.format.answer_close or ""))
    # A chat template may write the first opening; the cycle text includes it.
    opened = dialect.format.has_think_tags and dialect.decode(asked.prompt_ids).rstrip().endswith(
        dialect.format.think_open
    )
    async for event in recursion.run(asked.prompt_ids, limits):
        match event:
            case StepEvent(step=step) if step.finished:
                row.write(step.token_ids, step.native)
                sampled = list(zip(step.token_ids, step.native or (), strict=False))
            case StepEvent(step=step):
                row.open(step.token_ids)
            case CycleEvent(cycle=cycle):
                ids = row.end_cycle()
                written = ids
                if cycle.answer is not None and closing and ids[-len(closing) :] != closing:
                    ids = (*ids, *closing)
                text = (dialect.format.think_open if opened and not cycles else "") + dialect.decode(written)
                is_right, known = cycle.confidence == 1.0, _features(dialect, sampled, cycle.answer)
                cycles.append(RolledCycle(ids, text, cycle.answer, is_right, cycle.oops_tokens, known))
            case DraftEvent():
                pass  # of streams
            case FinalEvent():
                row.finish(is_right=cycles[-1].is_right)
    return Rollout(asked.question, asked.prompt_ids, row.ids, row.is_boundary, row.logps, tuple(cycles))


def _features(dialect: Dialect, sampled: Sequence[tuple[int, float]], answer: str | None) -> LogprobFeatures | None:
    if not sampled:
        return None
    return logprob_features([(dialect.decode([token]), logp) for token, logp in sampled], answer)


class _Row:
    """Builder of a row while its trajectory is generated."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self.ids: list[int] = []
        self.is_boundary: list[bool] = []
        self.logps: list[float] | None = None
        self._cycle_start = 0

    def write(self, ids: Sequence[int], logps: Sequence[float] | None) -> None:
        """Append sampled tokens."""
        self._append(ids, logps, is_boundary=False)

    def open(self, ids: Sequence[int]) -> None:
        """Append the opening of a cycle; an end of turn before it is removed from the row."""
        while self.ids and self.ids[-1] in self._dialect.end_of_turn_ids:
            self.ids.pop()
            self.is_boundary.pop()
            if self.logps is not None:
                self.logps.pop()
        self._cycle_start = len(self.ids)
        self._append(ids, None, is_boundary=True)

    def end_cycle(self) -> tuple[int, ...]:
        """Ids of the cycle just generated, without the end of turn."""
        ids = self.ids[self._cycle_start :]
        while ids and ids[-1] in self._dialect.end_of_turn_ids:
            ids.pop()
        return tuple(ids)

    def finish(self, *, is_right: bool) -> None:
        """Append the end of turn after a right answer if the policy did not write it."""
        if is_right and self.ids[-1] not in self._dialect.end_of_turn_ids:
            self._append([self._dialect.end_of_turn_id], None, is_boundary=True)

    def _append(self, ids: Sequence[int], logps: Sequence[float] | None, *, is_boundary: bool) -> None:
        if logps is not None and self.logps is None:
            self.logps = [float("nan")] * len(self.ids)
        self.ids += ids
        self.is_boundary += [is_boundary] * len(ids)
        if self.logps is not None:
            self.logps += logps if logps is not None else [float("nan")] * len(ids)
