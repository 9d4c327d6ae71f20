"""When a trajectory ends and which answer it returns. Pure: no clock, no engine, no I/O."""

from collections.abc import Sequence

from rtap_core.types import Cycle, Limits, Policy, Select, StopReason


def decide(
    cycles: Sequence[Cycle],
    limits: Limits,
    *,
    ended_turn: bool,
    truncated: bool,
    no_room: bool,
    cut: StopReason | None,
) -> StopReason | None:
    """Why the trajectory must end after ``cycles``, or None to write one more.

    ended_turn: the model ended its turn itself. truncated: the token budget cut the last cycle. no_room: it has
    nothing left for another one, which matters only where another one would follow. cut: why the work must end whatever
    it has come to, the deadline's or the server's reason.
    A good answer wins over a spent budget: the reason names what was reached, not what also ran out.
    """
    last = cycles[-1]
    if limits.policy is Policy.CONFIDENCE and clears(last, limits.threshold):
        return StopReason.THRESHOLD
    if limits.policy is Policy.MODEL and ended_turn:
        return StopReason.MODEL
    if cut is not None:
        return cut
    if truncated:
        return StopReason.MAX_TOKENS
    if len(cycles) >= max_cycles(limits):
        return StopReason.MAX_CYCLES
    if limits.patience is not None and cycles_without_gain(cycles) >= limits.patience:
        return StopReason.NO_GAIN
    return StopReason.MAX_TOKENS if no_room else None


def needs_score(limits: Limits) -> bool:
    """Whether anything is decided by the confidence of a cycle."""
    if limits.policy is Policy.MODEL:
        return limits.select is Select.BEST
    return limits.policy in (Policy.CONFIDENCE, Policy.VOTE)


def max_cycles(limits: Limits) -> int:
    """Cycles a trajectory may have: ``single`` is one pass whatever the request says."""
    return 1 if limits.policy is Policy.SINGLE else limits.max_cycles


def clears(cycle: Cycle, threshold: float) -> bool:
    """Whether a cycle is complete and judged good enough. A cut cycle never is."""
    return cycle.answer is not None and cycle.confidence is not None and cycle.confidence >= threshold


def cycles_without_gain(cycles: Sequence[Cycle]) -> int:
    """Cycles since the highest confidence so far was first reached; 0 when the last one is the highest."""
    scores = [c.confidence if c.answer is not None and c.confidence is not None else -1.0 for c in cycles]
    return len(scores) - 1 - scores.index(max(scores))


def choose(cycles: Sequence[Cycle], select: Select) -> int | None:
    """Position of the cycle to return: the most confident complete one, or the last complete one.

    Unscored cycles rank below every scored one; among equals the later wins, since it saw the earlier.
    None when no cycle has a complete answer."""
    complete = [i for i, c in enumerate(cycles) if c.answer is not None]
    if not complete:
        return None
    if select is Select.LAST:
        return complete[-1]
    return max(complete, key=lambda i: (_weight(cycles[i], unscored=-1.0), i))


def majority(cycles: Sequence[Cycle]) -> int | None:
    """Position of the cycle that stands for the winning answer of a vote; None when none is complete.

    Each complete sample votes with its confidence where one is known and with 1 otherwise; answers are compared
    after ``normalise_answer``. Ties go to the answer seen first."""
    weights: dict[str, float] = {}
    first: dict[str, int] = {}
    for i, cycle in enumerate(cycles):
        if cycle.answer is not None:
            key = normalise_answer(cycle.answer)
            weights[key] = weights.get(key, 0.0) + _weight(cycle, unscored=1.0)
            first.setdefault(key, i)
    if not weights:
        return None
    return first[max(weights, key=lambda key: (weights[key], -first[key]))]


def normalise_answer(answer: str) -> str:
    """Answers that differ only in spaces, letter case or a final full stop are one answer."""
    return "".join(answer.split()).casefold().removesuffix(".")


def _weight(cycle: Cycle, *, unscored: float) -> float:
    return unscored if cycle.confidence is None else cycle.confidence
