"""Metrics of a generation besides the rewards: sums over rollouts, reduced over processes, and their means."""

from collections.abc import Mapping, Sequence

from rtap_core.artifact import NUM_BINS, bin_gaps
from rtap_training.events import Sample
from rtap_training.rl.rollouts import Rollout


def sums_of(rollouts: Sequence[Rollout], confidences: Sequence[Sequence[float]]) -> dict[str, float]:
    """Sums over rollouts. confidences: of every cycle of every rollout; empty rows without a generator."""
    cycles = [c for r in rollouts for c in r.cycles]
    rows = zip(rollouts, confidences, strict=True)
    scored = [(p, c.is_right) for r, row in rows for p, c in zip(row, r.cycles, strict=False)]
    return {
        "rollouts": len(rollouts),
        "cycles": len(cycles),
        "tokens": sum(len(c.ids) for c in cycles),
        "first_right": sum(r.cycles[0].is_right for r in rollouts),
        "right": sum(r.is_right for r in rollouts),
        "oops": sum(c.oops_tokens for c in cycles),
        "confidence": sum(p for p, _ in scored),
        "squared_errors": sum((p - is_right) ** 2 for p, is_right in scored),
    } | _gaps(scored)


def _gaps(scored: Sequence[tuple[float, bool]]) -> dict[str, float]:
    return {f"gap {place}": gap for place, gap in enumerate(bin_gaps(scored))}


def means_of(totals: Mapping[str, float], *, has_generator: bool) -> dict[str, float]:
    """Logged metrics, from sums over all processes."""
    rollouts = totals["rollouts"]
    means = {
        "cycles/mean": totals["cycles"] / rollouts,
        "cycles/first_right": totals["first_right"] / rollouts,
        "cycles/right": totals["right"] / rollouts,
        "oops/per_rollout": totals["oops"] / rollouts,
        "oops/per_1000_tokens": 1000 * totals["oops"] / max(1, totals["tokens"]),
    }
    if has_generator:
        means["confidence/mean"] = totals["confidence"] / totals["cycles"]
        means["confidence/brier"] = totals["squared_errors"] / totals["cycles"]
        gaps = sum(abs(totals[f"gap {place}"]) for place in range(NUM_BINS))
        means["confidence/ece"] = gaps / totals["cycles"]
    return means


def samples_of(
    questions: Sequence[str], rollouts: Sequence[Rollout], confidences: Sequence[Sequence[float]]
) -> list[Sample]:
    """Rows of the samples table."""
    return [
        Sample(
            question, "".join(c.text for c in r.cycles), len(r.cycles), len(r.completion_ids), r.is_right,
            row[-1] if row else None,
        )
        for question, r, row in zip(questions, rollouts, confidences, strict=True)
    ]  # fmt: skip
