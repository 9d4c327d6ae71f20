"""Majority vote over the samples of one question. Pure."""

from collections.abc import Sequence

from rtap_core.answers import normalise_answer
from rtap_core.types import Cycle


def majority(cycles: Sequence[Cycle]) -> int | None:
    """Position of the first cycle with the winning answer; None if no answer is complete.

    A complete answer votes with its confidence, or with 1 if it was not scored. A tie goes to the answer seen first."""
    weights: dict[str, float] = {}
    first: dict[str, int] = {}
    for i, cycle in enumerate(cycles):
        if cycle.answer is not None:
            key = normalise_answer(cycle.answer)
            weights[key] = weights.get(key, 0.0) + (1.0 if cycle.confidence is None else cycle.confidence)
            first.setdefault(key, i)
    if not weights:
        return None
    return first[max(weights, key=lambda key: (weights[key], -first[key]))]
