"""Counters equal what the trajectory object says; labels stay bounded."""

from dataclasses import replace

from prometheus_client import CollectorRegistry

from rtap_core.types import Policy
from rtap_server.http.admission import Admission, Demand
from rtap_server.telemetry.metrics import Metrics
from tests.server.http.test_recursion_fields import _trajectory


def _observed(*trajectories):
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for trajectory in trajectories:
        metrics.observe(trajectory, max_cycles=8)
    return registry, metrics


def _sum(registry: CollectorRegistry, name: str) -> float:
    return sum(s.value for m in registry.collect() for s in m.samples if s.name == name)


def test_refusals_have_a_rate_from_their_first_on():
    registry, _ = _observed()
    for reason in ("draining", "invalid", "key_limit", "overloaded"):
        assert registry.get_sample_value("rtap_rejected_total", {"reason": reason}) == 0


def test_one_trajectory_is_counted_once_everywhere():
    done = _trajectory()
    registry, _ = _observed(done)
    assert registry.get_sample_value("rtap_requests_total", {"policy": "confidence", "stop_reason": "threshold"}) == 1
    assert registry.get_sample_value("rtap_cycles_sum") == 2
    assert _sum(registry, "rtap_reasoning_tokens_total") == done.reasoning_tokens
    assert _sum(registry, "rtap_oops_tokens_total") == 2
    assert registry.get_sample_value("rtap_oops_tokens_total", {"cycle": "2", "accepted": "true"}) == 1
    gains = [registry.get_sample_value("rtap_confidence_gain_bucket", {"le": le}) for le in ("0.25", "0.5")]
    assert gains == [0, 1]  # 0.75 - 0.25
    assert registry.get_sample_value("rtap_cached_tokens_total") == 32
    assert registry.get_sample_value("rtap_recomputed_tokens_total") == 28
    assert registry.get_sample_value("rtap_confidence_tokens_total") == 80
    assert registry.get_sample_value("rtap_first_cycle_accepted_total") == 0
    assert registry.get_sample_value("rtap_cycles_avoided_total") == 6


def test_degraded_abandoned_and_in_flight():
    registry, metrics = _observed(_trajectory(degraded="timeout", selected=0))
    metrics.count_abandoned(Policy.VOTE)
    assert registry.get_sample_value("rtap_degraded_total", {"reason": "timeout"}) == 1
    assert registry.get_sample_value("rtap_first_cycle_accepted_total") == 1
    assert registry.get_sample_value("rtap_requests_total", {"policy": "vote", "stop_reason": "abandoned"}) == 1
    admission = Admission(8)
    metrics.export_in_flight(lambda: admission.requests_in_flight)
    with admission.admit(Demand()):
        assert registry.get_sample_value("rtap_in_flight") == 1
    assert registry.get_sample_value("rtap_in_flight") == 0


def test_unscored_cycles_leave_the_confidence_series_alone():
    done = _trajectory()
    unscored = tuple(replace(c, confidence=None, confidence_seconds=None) for c in done.cycles)
    registry, _ = _observed(replace(done, cycles=unscored))
    assert _sum(registry, "rtap_cycle_confidence_count") == 0
    assert registry.get_sample_value("rtap_confidence_seconds_count") == 0
