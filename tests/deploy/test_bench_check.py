"""Regression guard of the benchmarks: ratios of the committed reports, and when one fails."""

import json
from pathlib import Path

import check as guard
import harness
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_committed_reports_have_ratios_to_guard():
    overhead = json.loads((ROOT / "docs/results/overhead.json").read_text())
    rivals = json.loads((ROOT / "docs/results/rivals/rivals.json").read_text())
    first, second = list(guard.overhead_ratios(overhead)), list(guard.rivals_ratios(rivals))
    assert any(r.higher_is_better for r in first)
    assert any(not r.higher_is_better for r in first)
    assert {r.name.rpartition(", ")[2] for r in second} == {
        "tokens over a majority of 8",
        "seconds over a majority of 8",
    }
    assert guard.failed_requests(overhead) == guard.failed_requests(rivals) == 0
    rivals["levels"][0]["rows"][0]["failed"] = 2
    assert guard.failed_requests(rivals) == 2
    names = [r.name for r in (*first, *second)]
    assert len(names) == len(set(names)) > 8


@pytest.mark.parametrize(
    ("higher_is_better", "value", "low", "high", "is_worse"),
    [
        (True, 0.85, 0.80, 0.91, False),  # the interval reaches 0.9
        (True, 0.85, 0.80, 0.89, True),
        (True, 1.50, 1.40, 1.60, False),
        (False, 1.15, 1.09, 1.20, False),
        (False, 1.15, 1.11, 1.20, True),
        (False, 0.50, 0.40, 0.60, False),
    ],
)
def test_a_ratio_fails_only_when_its_whole_interval_is_worse(higher_is_better, value, low, high, is_worse):
    committed = [guard.Ratio("a", 1.0, 0.9, 1.1, higher_is_better), guard.Ratio("gone", 1.0, 0.9, 1.1, True)]
    now = [guard.Ratio("a", value, low, high, higher_is_better), guard.Ratio("new", 9.0, 9.0, 9.0, False)]
    verdicts = guard.compare(committed, now, tolerance=0.1)
    assert [(v.now.name, v.is_worse) for v in verdicts] == [("a", is_worse)]


def test_the_flags_of_a_comparison_are_those_of_our_server():
    """A subprocess imports them from the server, which no type checker sees."""
    flags, environment = harness.common_flags()
    assert "--block-size" in flags
    assert "OMP_NUM_THREADS" in environment
