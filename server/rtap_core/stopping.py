"""Stop decisions, and the choice of the returned cycle. Pure: no clock, no engine, no I/O."""

from collections.abc import Sequence

from rtap_core.types import Cycle, Limits, Policy, Select, StopReason


def decide(
    cycles: Sequence[Cycle],
    limits: Limits,
    *,
    ended_turn: bool,
    ended_text: bool,
    truncated: bool,
    no_room: bool,
    cut: StopReason | None,
) -> StopReason | None:
    """Reason to end the trajectory after ``cycles``; None to generate another cycle.

    ended_turn: the model ended its turn. ended_text: a stop of the request ended the text, thoughts included.
    truncated: the token budget cut the last cycle.
    no_room: a budget holds no further cycle; it counts only if one would follow. cut: reason of the Cutoff.
    A good answer comes before a spent budget: the reason names what was reached.
    """
    last = cycles[-1]
    if limits.policy is Policy.CONFIDENCE and clears(last, limits.threshold):
        return StopReason.THRESHOLD
    if ended_text or (limits.policy is Policy.MODEL and ended_turn):
        return StopReason.MODEL
    if cut is not None:
        return cut
    if truncated:
        return StopReason.MAX_TOKENS
    if len(cycles) >= max_cycles(limits):
        return StopReason.MAX_CYCLES
    if limits.patience is not None and needs_score(limits) and cycles_without_gain(cycles) >= limits.patience:
        return StopReason.NO_GAIN
    return StopReason.MAX_TOKENS if no_room else None


def needs_score(limits: Limits) -> bool:
    """True if the confidence of a cycle decides anything."""
    if limits.policy is Policy.MODEL:
        return limits.select is Select.BEST
    return limits.policy in (Policy.CONFIDENCE, Policy.VOTE)


def max_cycles(limits: Limits) -> int:
    """Upper bound on the cycles of a trajectory: 1 for ``single``, whatever the request says."""
    return 1 if limits.policy is Policy.SINGLE else limits.max_cycles


def streams_answer(limits: Limits, *, ends_with_turn: bool) -> bool:
    """True if the first answer is the returned one, so that it can be shown while it is written.

    ends_with_turn: a cycle ends with the turn (formats without answer tags)."""
    if limits.policy is Policy.VOTE:
        return False
    return max_cycles(limits) == 1 or (limits.policy is Policy.MODEL and ends_with_turn)


def clears(cycle: Cycle, threshold: float) -> bool:
    """True if a cycle is complete and its confidence reaches ``threshold``."""
    return cycle.answer is not None and cycle.confidence is not None and cycle.confidence >= threshold


def cycles_without_gain(cycles: Sequence[Cycle]) -> int:
    """Cycles since the highest confidence so far was first reached; 0 if the last one is the highest."""
    scores = [c.confidence if c.answer is not None and c.confidence is not None else -1.0 for c in cycles]
    return len(scores) - 1 - scores.index(max(scores))


def choose(cycles: Sequence[Cycle], select: Select) -> int | None:
    """Position of the cycle to return: the most confident complete one, or the last complete one.

    Every scored cycle ranks above every unscored one. Of equals the later wins: it has seen the earlier.
    None if no cycle has a complete answer."""
    complete = [i for i, c in enumerate(cycles) if c.answer is not None]
    if not complete:
        return None
    if select is Select.LAST:
        return complete[-1]

    def rank(i: int) -> tuple[float, int]:
        confidence = cycles[i].confidence
        return (-1.0 if confidence is None else confidence, i)

    return max(complete, key=rank)
