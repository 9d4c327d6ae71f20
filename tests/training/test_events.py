"""The table of samples that TensorBoard renders, the figures beside it, and the calibration of rollouts."""

import pytest

from rtap_training.data.trajectories import SampledTrajectory
from rtap_training.events import MAX_ROWS, Sample, last_confidences, means_over, samples_table
from rtap_training.rl.figures import means_of, samples_of, sums_of
from rtap_training.rl.messages import last_text
from rtap_training.rl.rollouts import RolledCycle, Rollout

RIGHT, WRONG = RolledCycle((1, 2, 3), "", "82", True, 0), RolledCycle((4, 5), "", "81", False, 0)
CUT = RolledCycle((6,), "", None, False, 0)


def turn(*cycles: RolledCycle) -> SampledTrajectory:
    return SampledTrajectory(0, (9,), cycles, sum(len(c.ids) for c in cycles))


def test_text_of_a_model_cannot_shape_the_table() -> None:
    hostile = "a | b\n<script>x</script> `c` [d](http://e) & **f**"
    rows = samples_table([Sample(hostile, hostile, 2, 9, True, 0.5)]).splitlines()
    assert len(rows) == 3
    assert rows[2].startswith("| yes | 0.500 | 2 | 9 | a \\| b &lt;script&gt;")
    assert "<" not in rows[2]
    assert rows[2].replace("\\|", "").count("|") == 7
    assert "\\[d\\](http://e) &amp; \\*\\*f\\*\\*" in rows[2]


def test_a_table_is_short_and_says_where_there_is_no_confidence() -> None:
    rows = samples_table([Sample("q", "t" * 5000, 1, 3, False)] * 50).splitlines()
    assert len(rows) == 2 + MAX_ROWS
    assert rows[2].startswith("| no | – | 1 | 3 | q | ttt")
    assert len(rows[2]) < 1000


def test_means_over_trajectories() -> None:
    turns = [turn(RIGHT), turn(WRONG, RIGHT), turn(WRONG, CUT)]
    figures = means_over(turns, tokens=sum(t.tokens for t in turns), oops=4)
    assert figures == {
        "first_right": pytest.approx(1 / 3), "right": pytest.approx(2 / 3), "cycles": pytest.approx(5 / 3),
        "tokens": pytest.approx(11 / 3), "oops_per_1000_tokens": pytest.approx(4000 / 11),
    }  # fmt: skip


def test_the_confidence_of_a_turn_is_that_of_its_last_cycle() -> None:
    turns = [turn(WRONG, RIGHT), turn(WRONG, CUT), turn(RIGHT)]
    assert last_confidences(turns, [0.1, 0.9, 0.2, 0.8]) == [0.9, None, 0.8]


def rollout(*rights: bool) -> Rollout:
    cycles = tuple(RolledCycle((1, 2), "<think>t</think>", "x", right, 0) for right in rights)
    return Rollout("0", [9], [1, 2] * len(rights), [False] * 2 * len(rights), None, cycles)


def test_the_calibration_error_is_by_bins_and_adds_up_over_processes() -> None:
    first, second = sums_of([rollout(False, True)], [[0.02, 0.98]]), sums_of([rollout(False)], [[0.99]])
    totals = {name: first[name] + second[name] for name in first}
    means = means_of(totals, has_generator=True)
    # lowest bin: 0.02 for a wrong one; highest: 0.98 + 0.99 for one right of two
    assert means["confidence/ece"] == pytest.approx((0.02 + 0.97) / 3)
    assert means["confidence/brier"] == pytest.approx((0.02**2 + 0.02**2 + 0.99**2) / 3)
    assert "confidence/ece" not in means_of(totals, has_generator=False)


def test_samples_of_a_generation() -> None:
    (with_score, without) = samples_of(["a", "b"], [rollout(False, True), rollout(False)], [[0.1, 0.7], []])
    assert (with_score.confidence, with_score.cycles, with_score.tokens, with_score.is_right) == (0.7, 2, 4, True)
    assert (without.confidence, without.question, without.text) == (None, "b", "<think>t</think>")


def test_the_text_of_a_question_with_pictures() -> None:
    assert last_text([{"role": "user", "content": "plain"}]) == "plain"
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]
    assert last_text([{"role": "system", "content": "s"}, {"role": "user", "content": parts}]) == "what is it"
