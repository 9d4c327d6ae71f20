"""Verdicts on answers: what is remembered, for how long, and the figures that come of it."""

import math
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from rtap_core.artifact import NUM_BINS
from rtap_core.errors import InvalidRequest, UnknownRequest
from rtap_core.types import Policy
from rtap_server.telemetry.feedback import Feedback
from rtap_server.telemetry.metrics import Metrics
from tests.server.http.test_recursion_fields import CYCLE, _trajectory


def _cycle(confidence: float | None):
    return replace(CYCLE, confidence=confidence, accepted=True)


def _scored(confidence: float):
    return _trajectory(cycles=(_cycle(confidence),), selected=0)


def test_brier_and_ece_are_those_of_the_verdicts():
    feedback = Feedback()
    for number, (confidence, correct) in enumerate([(0.9, True), (0.9, False), (0.2, False), (1.0, True)]):
        feedback.remember(f"chatcmpl-{number}", {0: _scored(confidence)})
        assert feedback.judge(f"chatcmpl-{number}", 0, correct=correct) == confidence
    assert feedback.brier == pytest.approx((0.01 + 0.81 + 0.04 + 0) / 4)
    assert feedback.ece == pytest.approx((0.8 + 0.2 + 0) / 4)  # one bin of two at 0.9, half of them right


def test_confidences_that_keep_their_promise_have_a_small_error():
    rng = random.Random(1)
    feedback = Feedback(window=5_000)
    for number in range(5_000):
        confidence = rng.random()
        feedback.remember(str(number), {0: _scored(confidence)})
        feedback.judge(str(number), 0, correct=rng.random() < confidence)
    assert feedback.ece < 0.04
    assert feedback.brier == pytest.approx(1 / 6, abs=0.02)


def test_a_second_verdict_replaces_the_first():
    feedback = Feedback()
    feedback.remember("a", {0: _scored(0.9)})
    feedback.judge("a", 0, correct=False)
    feedback.judge("a", 0, correct=True)
    assert (feedback.count, feedback.brier) == (1, pytest.approx(0.01))


def test_an_unscored_answer_takes_a_verdict_and_calibrates_nothing():
    feedback = Feedback()
    feedback.remember("a", {0: _trajectory(cycles=(_cycle(None),), selected=0)})
    assert feedback.judge("a", 0, correct=True) is None
    assert feedback.count == 0
    assert math.isnan(feedback.brier)
    assert math.isnan(feedback.ece)


def test_answers_and_verdicts_are_bounded():
    feedback = Feedback(capacity=3, window=2)
    for number in range(5):
        feedback.remember(str(number), {0: _scored(0.5)})
    with pytest.raises(UnknownRequest, match="no answer '1' is known: this server remembers the last 3"):
        feedback.judge("1", 0, correct=True)
    for number in range(2, 5):
        feedback.judge(str(number), 0, correct=True)
    assert feedback.count == 2


def test_a_choice_that_was_not_there_is_named():
    feedback = Feedback()
    feedback.remember("a", {0: _scored(0.5), 1: _scored(0.6)})
    assert feedback.judge("a", 1, correct=True) == 0.6
    with pytest.raises(InvalidRequest, match=r"a has choices \[0, 1\], not 2"):
        feedback.judge("a", 2, correct=True)


def test_drift_is_small_for_the_reference_and_large_for_another_distribution():
    rng = random.Random(2)
    reference = [1.0] * NUM_BINS  # uniform, as counts
    same, other = Feedback(reference), Feedback(reference)
    for number in range(1_000):
        same.remember(str(number), {0: _scored(rng.random())})
        other.remember(str(number), {0: _scored(0.5 * rng.random())})
    assert same.drift < 0.1
    assert other.drift > 1


def test_drift_reads_first_cycles_and_every_sample_of_a_vote():
    feedback = Feedback([1.0, 1.0], least=2)
    feedback.remember("a", {0: _trajectory(cycles=(_cycle(0.2), _cycle(0.9)), selected=1)})
    assert math.isnan(feedback.drift)  # the second cycle exists because the first was weak: not comparable
    vote = _trajectory(cycles=(_cycle(0.9), _cycle(0.8), _cycle(0.1)), selected=0, policy=Policy.VOTE)
    feedback.remember("b", {0: vote})
    assert feedback.drift == pytest.approx(0.0, abs=1e-9)  # two below one half, two above


def test_figures_reach_the_metrics_as_they_are():
    registry, feedback = CollectorRegistry(), Feedback()
    metrics = Metrics(registry)
    metrics.export_calibration(feedback)
    assert math.isnan(registry.get_sample_value("rtap_calibration_brier") or 0.0)
    feedback.remember("a", {0: _scored(0.5)})
    feedback.judge("a", 0, correct=True)
    metrics.count_feedback(correct=True)
    assert registry.get_sample_value("rtap_calibration_brier") == 0.25
    assert registry.get_sample_value("rtap_calibration_ece") == 0.5
    assert registry.get_sample_value("rtap_calibration_verdicts") == 1
    assert registry.get_sample_value("rtap_feedback_total", {"correct": "true"}) == 1


def test_a_scrape_in_its_own_thread_reads_while_answers_and_verdicts_come():
    feedback, is_over = Feedback([1.0, 1.0], least=2, window=200), threading.Event()

    def scrape() -> int:
        times = 0
        while not is_over.is_set():
            assert not feedback.drift < 0
            assert not feedback.brier < 0
            assert not feedback.ece < 0
            times += 1
        return times

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads take turns within the reading of one figure
    try:
        with ThreadPoolExecutor(1) as pool:
            scraped = pool.submit(scrape)
            for number in range(4_000):
                feedback.remember(str(number), {0: _scored(number % 100 / 100)})
                feedback.judge(str(number), 0, correct=number % 2 == 0)
            is_over.set()
            assert scraped.result(30) > 10
    finally:
        is_over.set()
        sys.setswitchinterval(before)
