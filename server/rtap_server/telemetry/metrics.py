"""Prometheus series ``rtap_*``, counted once when a trajectory ends, from the object that the response reports.

Labels are bounded: policies, stop reasons, cycle numbers up to the server's limit. No ids, no user text.
"""

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rtap_core.types import Cycle, Policy, StopReason, Trajectory
from rtap_server.telemetry.feedback import Feedback

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SCORING_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_CYCLES = (1, 2, 3, 4, 5, 6, 8, 10, 16)
_CONFIDENCE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_GAIN = (-1, -0.5, -0.25, -0.1, -0.01, 0, 0.01, 0.1, 0.25, 0.5, 1)


class Metrics:
    """All series on one registry."""

    REJECTED = (
        "overloaded", "body_too_large", "invalid", "unauthorized", "key_limit", "draining", "unknown"
    )  # fmt: skip
    DEGRADED = ("error", "timeout", "too_long", "image", "no_logprobs", "restarting")
    ABANDONED = "abandoned"  # stop reason of a request whose client left or whose engine failed

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(name, help_, labels, registry=registry)

        def histogram(name: str, help_: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help_, labels, buckets=buckets, registry=registry)

        self._requests = counter("rtap_requests", "Finished trajectories.", "policy", "stop_reason")
        self._cycles = histogram("rtap_cycles", "Cycles of a trajectory.", _CYCLES)
        self._confidence = histogram("rtap_cycle_confidence", "Confidence of a scored cycle.", _CONFIDENCE, "cycle")
        self._gain = histogram("rtap_confidence_gain", "Confidence of a cycle minus the one before it.", _GAIN)
        self._first_accepted = counter("rtap_first_cycle_accepted", "Trajectories whose first cycle was returned.")
        self._oops = counter("rtap_oops_tokens", "Tokens of self-doubt phrases.", "cycle", "accepted")
        self._reasoning = counter(
            "rtap_reasoning_tokens", "Tokens written except the returned answer's.", "cycle", "accepted"
        )
        self._first_answer = histogram(
            "rtap_time_to_first_answer_seconds", "From the request to the first complete answer.", _SECONDS
        )
        self._request_seconds = histogram("rtap_request_seconds", "Whole trajectory.", _SECONDS)
        self._cycle_seconds = histogram("rtap_cycle_seconds", "Generating and scoring one cycle.", _SECONDS)
        self._scoring = histogram("rtap_confidence_seconds", "Waiting for the generator's score.", _SCORING_SECONDS)
        self._confidence_tokens = counter("rtap_confidence_tokens", "Tokens the generator read.")
        self._discarded = counter("rtap_discarded_tokens", "Tokens of finished requests that are in no cycle.")
        self._cached = counter("rtap_cached_tokens", "Prompt tokens of cycles found in the prefix cache.")
        self._recomputed = counter("rtap_recomputed_tokens", "Prompt tokens of cycles computed again.")
        self._degraded = counter("rtap_degraded", "Trajectories that continued without the generator.", "reason")
        self._fresh_fallbacks = counter(
            "rtap_fresh_fallbacks", "Trajectories with fresh attempts after a continued cycle that was empty."
        )
        self._rejected = counter("rtap_rejected", "Requests refused before generation.", "reason")
        # Series that alerts use exist from the start: a counter has no rate before its second sample.
        for reason in self.REJECTED:
            self._rejected.labels(reason)
        for reason in self.DEGRADED:
            self._degraded.labels(reason)
        self._avoided = counter(
            "rtap_cycles_avoided", "Cycles left in the budget of requests that reached the threshold."
        )
        self._in_flight = Gauge("rtap_in_flight", "Requests in flight.", registry=registry)
        self._trajectories = Gauge("rtap_trajectories", "Trajectories being generated.", registry=registry)
        self._draining = Gauge("rtap_draining", "1 during a graceful shutdown.", registry=registry)
        self._tasks = Gauge("rtap_asyncio_tasks", "Tasks of the API process's event loop.", registry=registry)
        self._engine_up = Gauge("rtap_engine_up", "1 while an engine runs.", ("engine",), registry=registry)
        self._engine_progress = Gauge(
            "rtap_engine_last_progress_timestamp_seconds",
            "Time of an engine's last message, moved on while it has no requests.",
            ("engine",),
            registry=registry,
        )
        self._engine_restarts = counter("rtap_engine_restarts", "Restarts of engines.", "engine")
        self._feedback = counter("rtap_feedback", "Verdicts of users on answers.", "correct")
        self._verdicts = Gauge("rtap_calibration_verdicts", "Verdicts in the calibration figures.", registry=registry)
        self._brier = Gauge("rtap_calibration_brier", "Brier score over recent verdicts.", registry=registry)
        self._ece = Gauge("rtap_calibration_ece", "Expected calibration error over recent verdicts.", registry=registry)
        self._drift = Gauge(
            "rtap_confidence_drift",
            "Population stability index of recent first-cycle confidences against the generator's reference.",
            registry=registry,
        )
        self._build = Gauge(
            "rtap_build_info",
            "1, with versions as labels.",
            ("version", "vllm_version", "confidence"),
            registry=registry,
        )

    def set_build_info(self, *, version: str, vllm_version: str, confidence: str) -> None:
        """Set the build information."""
        self._build.labels(version, vllm_version, confidence).set(1)

    def export_calibration(self, feedback: Feedback) -> None:
        """Export the calibration figures, read at every scrape; NaN without verdicts."""
        self._verdicts.set_function(lambda: feedback.count)
        self._brier.set_function(lambda: feedback.brier)
        self._ece.set_function(lambda: feedback.ece)
        self._drift.set_function(lambda: feedback.drift)

    def export_drain(self, has_begun: Callable[[], bool], trajectories: Callable[[], int]) -> None:
        """Export the state of the graceful shutdown, read at every scrape."""
        self._draining.set_function(lambda: float(has_begun()))
        self._trajectories.set_function(lambda: float(trajectories()))

    def export_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Export the number of asyncio tasks; it must not grow without requests."""
        self._tasks.set_function(lambda: float(len(asyncio.all_tasks(loop))))

    def set_engine_up(self, name: str, *, up: bool) -> None:
        """Set 1 when an engine has started, 0 when it was lost."""
        self._engine_up.labels(name).set(float(up))
        self._engine_restarts.labels(name)  # creates the series at 0

    def set_engine_progress(self, name: str, timestamp_seconds: float) -> None:
        """Set the time of an engine's last progress, in seconds since 1970."""
        self._engine_progress.labels(name).set(timestamp_seconds)

    def count_restart(self, name: str) -> None:
        self._engine_restarts.labels(name).inc()

    def count_feedback(self, *, correct: bool) -> None:
        self._feedback.labels("true" if correct else "false").inc()

    def export_in_flight(self, count: Callable[[], int]) -> None:
        """Export the requests in flight, read at every scrape."""
        self._in_flight.set_function(lambda: float(count()))

    def count_rejected(self, reason: str) -> None:
        """Count a refused request. reason: one of REJECTED."""
        self._rejected.labels(reason).inc()

    def count_abandoned(self, policy: Policy) -> None:
        self._requests.labels(policy, self.ABANDONED).inc()

    def observe(self, trajectory: Trajectory, *, max_cycles: int) -> None:
        """Count one finished trajectory. max_cycles: its limit."""
        self._requests.labels(trajectory.policy, trajectory.stop_reason).inc()
        self._cycles.observe(len(trajectory.cycles))
        self._request_seconds.observe(trajectory.seconds)
        if trajectory.first_answer_seconds is not None:
            self._first_answer.observe(trajectory.first_answer_seconds)
        in_sequence = trajectory.policy is not Policy.VOTE  # samples of a vote have no order
        if trajectory.selected == 0 and in_sequence:
            self._first_accepted.inc()
        if trajectory.degraded is not None:
            self._degraded.labels(trajectory.degraded).inc()
        self._fresh_fallbacks.inc(trajectory.is_fresh_fallback)
        if trajectory.stop_reason is StopReason.THRESHOLD:
            self._avoided.inc(max(0, max_cycles - len(trajectory.cycles)))
        self._discarded.inc(trajectory.discarded_tokens)
        self._confidence_tokens.inc(trajectory.confidence_tokens)
        before: float | None = None
        for cycle in trajectory.cycles:
            self._observe_cycle(cycle)
            if cycle.confidence is not None:
                if before is not None and in_sequence:
                    self._gain.observe(cycle.confidence - before)
                before = cycle.confidence

    def _observe_cycle(self, cycle: Cycle) -> None:
        number, accepted = str(cycle.index + 1), "true" if cycle.accepted else "false"
        self._oops.labels(number, accepted).inc(cycle.oops_tokens)
        self._reasoning.labels(number, accepted).inc(cycle.tokens - (cycle.answer_tokens if cycle.accepted else 0))
        self._cycle_seconds.observe(cycle.seconds)
        self._cached.inc(cycle.cached_tokens)
        self._recomputed.inc(max(0, cycle.prompt_tokens - cycle.cached_tokens))
        if cycle.confidence is not None:
            self._confidence.labels(number).observe(cycle.confidence)
        if cycle.confidence_seconds is not None:
            self._scoring.observe(cycle.confidence_seconds)
