"""The five R-TAP rewards of a finished trajectory (arXiv 2603.02099 eq. 7-9, and Open-R1's). Pure functions.

The paper sums them with weight one. A trajectory is cut at its first right answer, so its last cycle decides.
"""

import itertools
from collections.abc import Sequence

from rtap_core.format import TrajectoryFormat


def confidence_increase(confidences: Sequence[float]) -> float:
    """Share of cycles with a higher confidence than the previous one, in [0, 1] (eq. 7). A single cycle gets 1.

    confidences: in cycle order. Raises ValueError when there are none.
    """
    if not confidences:
        raise ValueError("a trajectory without cycles has no confidence reward")
    if len(confidences) == 1:
        return 1.0
    rises = sum(later > earlier for earlier, later in itertools.pairwise(confidences))
    return rises / (len(confidences) - 1)


def confidence_final(confidences: Sequence[float], threshold: float) -> float:
    """1 when the last cycle's confidence reaches ``threshold``, else 0 (eq. 8; the paper's threshold is 0.55)."""
    if not confidences:
        raise ValueError("a trajectory without cycles has no confidence reward")
    return float(confidences[-1] >= threshold)


def well_formed(cycles: Sequence[str], fmt: TrajectoryFormat) -> float:
    """1 if every cycle is one thought and one answer, each tag once and in order, else 0; in a format without tags 1
    if no cycle is blank.

    Open-R1's format reward for every cycle; the paper does not say how it treats several.
    """
    return float(bool(cycles) and all(_is_pair(text, fmt) for text in cycles))


def _is_pair(text: str, fmt: TrajectoryFormat) -> bool:
    tags = fmt.tags
    if not tags:
        return bool(text.removeprefix(fmt.cycle_open).strip())
    if any(text.count(tag) != 1 for tag in tags):
        return False
    places = [text.index(tag) for tag in tags]
    tail = text[places[-1] + len(tags[-1]) :].strip()
    is_closed = not tail if fmt.has_answer_tags else bool(tail)
    return places == sorted(places) and not text[: places[0]].strip() and is_closed


def answer_reward(is_right: bool) -> float:
    """1 if the last kept cycle is right: with the cut, right within the allowed cycles."""
    return float(is_right)


def length_penalty(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """0 up to ``max_tokens - cache_tokens``, then linear down to -1 at ``max_tokens`` (DAPO eq. 13, used by Open-R1).

    The R-TAP paper states neither number. Raises ValueError unless 0 < cache_tokens <= max_tokens.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens={cache_tokens} must be in 1..max_tokens={max_tokens}")
    excess = num_tokens - (max_tokens - cache_tokens)
    return -min(1.0, max(0.0, excess / cache_tokens))
