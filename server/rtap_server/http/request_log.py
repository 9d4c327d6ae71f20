"""What one exchange came to, in a few numbers: what a log line and a span say of a request.

Nothing of prompts, thoughts or answers is in it. Counting for Prometheus is ``metrics.py``'s job.
"""

from dataclasses import dataclass

from starlette.types import Scope

from rtap_core.types import Trajectory
from rtap_server.http.schema import Exchange, reasoning_tokens
from rtap_server.telemetry.metrics import Metrics

_NOTES = "rtap.notes"


@dataclass(slots=True)
class Notes:
    """What layers inside find out of a request, for those outside. key: its owner's name for it."""

    key: str | None = None
    exchange: Exchange | None = None


def notes_of(scope: Scope) -> Notes:
    """The one object of a request, however often layers copy its scope: the outermost that wants it asks first."""
    return scope.setdefault(_NOTES, Notes())


@dataclass(frozen=True, slots=True)
class Outcome:
    """All choices of a request together. Tokens are written ones, but for prompt_tokens, which its question has.

    stop_reason: ``abandoned`` where a choice was not finished; several different ones are joined by commas.
    confidence, selected_cycle, first_answer_seconds: of the first choice.
    """

    model: str | None
    choices: int
    policy: str | None
    stop_reason: str
    cycles: int
    prompt_tokens: int
    tokens: int
    reasoning_tokens: int
    oops_tokens: int
    discarded_tokens: int
    confidence: float | None
    selected_cycle: int | None
    first_answer_seconds: float | None
    degraded: str | None


def outcome(exchange: Exchange | None) -> Outcome | None:
    """What has been finished of an exchange; None for one that never reached the engine."""
    if exchange is None or not exchange.num_choices:
        return None
    done = [exchange.trajectories[choice] for choice in sorted(exchange.trajectories)]
    first = exchange.trajectories.get(0)
    reasons = {str(t.stop_reason) for t in done}
    if len(done) < exchange.num_choices:
        reasons.add(Metrics.ABANDONED)
    return Outcome(
        model=exchange.model or None,
        choices=exchange.num_choices,
        policy=str(done[0].policy) if done else None,
        stop_reason=",".join(sorted(reasons)),
        cycles=sum(len(t.cycles) for t in done),
        prompt_tokens=0 if first is None else _prompt_tokens(first),
        tokens=sum(c.tokens for t in done for c in t.cycles),
        reasoning_tokens=sum(reasoning_tokens(t) for t in done),
        oops_tokens=sum(c.oops_tokens for t in done for c in t.cycles),
        discarded_tokens=sum(t.discarded_tokens for t in done),
        confidence=None if first is None else first.confidence,
        selected_cycle=None if first is None else first.selected,
        first_answer_seconds=None if first is None else first.first_answer_seconds,
        degraded=next((t.degraded for t in done if t.degraded is not None), None),
    )


def _prompt_tokens(trajectory: Trajectory) -> int:
    return trajectory.cycles[0].prompt_tokens if trajectory.cycles else 0
