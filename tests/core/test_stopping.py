"""Stop decisions and answer selection, exhaustively where the cases are few."""

import itertools
from dataclasses import replace

import pytest

from rtap_core import stopping
from rtap_core.types import Cycle, Limits, Policy, Select, StopReason

_BASE = Cycle(0, "t", "1", None, False, 10, 3, 0, 20, 0, 0.1, None, 0)
_NEVER = {"ended_turn": False, "ended_text": False, "truncated": False, "no_room": False, "cut": None}


def _cycles(*scores: float | None, answers: str | None = None) -> list[Cycle]:
    texts = answers or "1" * len(scores)
    return [
        replace(_BASE, index=i, confidence=s, answer=None if a == "-" else a)
        for i, (s, a) in enumerate(zip(scores, texts, strict=True))
    ]


@pytest.mark.parametrize(("score", "reason"), [(0.49, None), (0.5, StopReason.THRESHOLD), (0.51, StopReason.THRESHOLD)])
def test_confidence_stops_at_the_threshold(score, reason):
    assert stopping.decide(_cycles(score), Limits(threshold=0.5), **_NEVER) is reason


def test_a_cut_cycle_never_clears_even_a_zero_threshold():
    assert stopping.decide(_cycles(0.9, answers="-"), Limits(threshold=0.0), **_NEVER) is None
    assert stopping.decide(_cycles(None), Limits(threshold=0.0), **_NEVER) is None


def test_single_stops_after_one_cycle_and_model_when_the_model_ends():
    assert stopping.decide(_cycles(None), Limits(policy=Policy.SINGLE), **_NEVER) is StopReason.MAX_CYCLES
    model = Limits(policy=Policy.MODEL)
    assert stopping.decide(_cycles(None), model, **_NEVER) is None
    assert stopping.decide(_cycles(None), model, **(_NEVER | {"ended_turn": True})) is StopReason.MODEL


@pytest.mark.parametrize("policy", [Policy.CONFIDENCE, Policy.MODEL])
def test_max_cycles_bounds_every_recursive_policy(policy):
    limits = Limits(policy=policy, max_cycles=3)
    assert stopping.decide(_cycles(0.1, 0.1), limits, **_NEVER) is None
    assert stopping.decide(_cycles(0.1, 0.1, 0.1), limits, **_NEVER) is StopReason.MAX_CYCLES


def test_reasons_have_a_fixed_order_of_precedence():
    good, bad = _cycles(0.9), _cycles(0.1)
    for cut, tokens in itertools.product([None, StopReason.DEADLINE, StopReason.DRAINED], [False, True]):
        spent = _NEVER | {"truncated": tokens, "cut": cut}
        assert stopping.decide(good, Limits(max_cycles=1), **spent) is StopReason.THRESHOLD
        expected = cut or (StopReason.MAX_TOKENS if tokens else StopReason.MAX_CYCLES)
        assert stopping.decide(bad, Limits(max_cycles=1), **spent) is expected


def test_patience_counts_cycles_since_the_best():
    assert stopping.cycles_without_gain(_cycles(0.2)) == 0
    assert stopping.cycles_without_gain(_cycles(0.2, 0.3)) == 0
    assert stopping.cycles_without_gain(_cycles(0.3, 0.3, 0.1)) == 2  # an equal score is no gain
    limits = Limits(patience=2)
    assert stopping.decide(_cycles(0.3, 0.1), limits, **_NEVER) is None
    assert stopping.decide(_cycles(0.3, 0.1, 0.2), limits, **_NEVER) is StopReason.NO_GAIN


def test_best_is_the_most_confident_complete_cycle_and_the_later_of_equals():
    assert stopping.choose(_cycles(0.2, 0.9, 0.4), Select.BEST) == 1
    assert stopping.choose(_cycles(0.2, 0.9, 0.4, answers="1-1"), Select.BEST) == 2
    assert stopping.choose(_cycles(0.4, 0.4), Select.BEST) == 1
    assert stopping.choose(_cycles(None, 0.0), Select.BEST) == 1  # any score beats none
    assert stopping.choose(_cycles(None, None), Select.BEST) == 1


def test_last_is_the_last_complete_cycle_and_none_is_none():
    assert stopping.choose(_cycles(0.9, 0.1, 0.5, answers="12-"), Select.LAST) == 1
    for select in Select:
        assert stopping.choose(_cycles(0.9, 0.9, answers="--"), select) is None


def test_no_room_for_another_cycle_matters_only_where_another_would_follow():
    full = _NEVER | {"no_room": True}
    assert stopping.decide(_cycles(0.1), Limits(), **full) is StopReason.MAX_TOKENS
    assert stopping.decide(_cycles(0.1), Limits(max_cycles=1), **full) is StopReason.MAX_CYCLES
    assert stopping.decide(_cycles(None), Limits(policy=Policy.SINGLE), **full) is StopReason.MAX_CYCLES
    assert (
        stopping.decide(_cycles(None), Limits(policy=Policy.MODEL), **full | {"ended_turn": True}) is StopReason.MODEL
    )


def test_patience_does_not_end_a_trajectory_without_scores():
    limits = Limits(policy=Policy.MODEL, max_cycles=8, patience=2, select=Select.LAST)
    unscored = _cycles(None, None, None, None)
    reason = stopping.decide(unscored, limits, **_NEVER)
    assert reason is None
