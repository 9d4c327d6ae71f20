"""Each reward by its definition in the paper, edges included."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.format import RTAP, TEXT, THINK
from rtap_training.rewards import answer_reward, confidence_final, confidence_increase, length_penalty, well_formed


@pytest.mark.parametrize(
    ("confidences", "share"),
    [([0.3], 1.0), ([0.1, 0.2], 1.0), ([0.2, 0.1], 0.0), ([0.2, 0.2], 0.0), ([0.1, 0.5, 0.4, 0.6], 2 / 3)],
)
def test_increase_is_the_share_of_rises(confidences: list[float], share: float) -> None:
    assert confidence_increase(confidences) == pytest.approx(share)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_increase_counts_rises_not_their_size(confidences: list[float]) -> None:
    squared = [c * c for c in confidences]
    order = [a < b for a, b in itertools.pairwise(confidences)]
    if order == [a < b for a, b in itertools.pairwise(squared)]:  # squaring may round two values together
        assert confidence_increase(confidences) == confidence_increase(squared)


def test_final_looks_at_the_last_cycle_only() -> None:
    assert confidence_final([0.9, 0.54], 0.55) == 0.0
    assert confidence_final([0.1, 0.55], 0.55) == 1.0


@pytest.mark.parametrize("reward", [confidence_increase, lambda c: confidence_final(c, 0.5)])
def test_no_cycles_is_an_error(reward) -> None:
    with pytest.raises(ValueError, match="without cycles"):
        reward([])


GOOD = "<think>1+1=2</think><answer>2</answer>"


@pytest.mark.parametrize(
    ("cycles", "is_good"),
    [
        ([GOOD], True),
        ([GOOD, GOOD], True),
        (["<think></think>\n<answer>2</answer>\n"], True),
        ([], False),
        ([GOOD, "<think>1+1"], False),
        (["<think>a</think><answer>2"], False),
        (["a<think></think><answer>2</answer>"], False),
        (["<think>a</think><answer>2</answer> bye"], False),
        (["<answer>2</answer><think>a</think>"], False),
        (["<think><think>a</think><answer>2</answer>"], False),
    ],
)
def test_well_formed_wants_one_pair_in_every_cycle(cycles: list[str], is_good: bool) -> None:
    assert well_formed(cycles, RTAP) == float(is_good)


def test_well_formed_without_tags_wants_text() -> None:
    assert well_formed(["so it is 8"], TEXT) == 1.0
    assert well_formed(["so it is 8", " \n"], TEXT) == 0.0
    assert well_formed(["so it is 8", TEXT.cycle_open], TEXT) == 0.0
    assert well_formed([], TEXT) == 0.0


def test_well_formed_without_answer_tags_wants_text_after_the_thought() -> None:
    assert well_formed(["<think>a</think>2"], THINK) == 1.0
    assert well_formed(["<think>a</think>"], THINK) == 0.0


def test_answer_reward_is_zero_or_one() -> None:
    assert (answer_reward(True), answer_reward(False)) == (1.0, 0.0)


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (75, 0.0), (80, -0.2), (100, -1.0), (500, -1.0)])
def test_length_penalty_is_linear_in_the_last_stretch(tokens: int, penalty: float) -> None:
    assert length_penalty(tokens, max_tokens=100, cache_tokens=25) == pytest.approx(penalty)


def test_length_penalty_needs_a_stretch_within_the_limit() -> None:
    with pytest.raises(ValueError, match="cache_tokens=200"):
        length_penalty(1, max_tokens=100, cache_tokens=200)
