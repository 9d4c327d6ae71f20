"""Report of the benchmarks: the goals it reads from the committed figures, and when one is met."""

import json
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).resolve().parents[2]


def _row(rule: str, accuracy: float, tokens: float, seconds: float, *, over: float = 0.0) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    return {
        "rule": rule, "questions": 100, "accuracy": around(accuracy), "tokens": tokens, "seconds": seconds,
        "accuracy_difference": around(over), "tokens_ratio": around(tokens / 200),
        "seconds_ratio": around(seconds / 0.1), "failed": 0,
    }  # fmt: skip


def _level(*rows: dict[str, Any], at: int = 32) -> dict[str, Any]:
    return {"at": at, "task": "countdown", "rows": [_row("majority of 8", 0.5, 200, 0.1), *rows]}


def test_the_quickest_rule_that_reaches_the_majority_is_held_to_the_goals() -> None:
    rows = [
        _row("single", 0.49, 40, 0.01, over=0.1),  # no rule of ours, whatever it reaches
        _row("confidence, 2 cycles at most", 0.49, 40, 0.02, over=-0.025),  # quicker, but for certain not as right
        _row("confidence, 4 cycles at most", 0.6, 60, 0.03, over=0.1),
        _row("model, 2 cycles at most", 0.49, 50, 0.025, over=-0.015),  # within what an accuracy may be below
        _row("optillm bon", 0.5, 100, 0.03),
    ]
    tokens, seconds, optillm = report._against_rivals(_level(*rows))
    assert "(model, 2 cycles at most; right -0.015 [-0.025, -0.005])" in tokens.name
    assert (tokens.is_met, tokens.measured[:5], seconds.is_met) == (True, "0.250", True)
    assert (optillm.is_met, optillm.measured) == (True, "2.0 and 1.2 times")
    (lost,) = report._against_rivals(_level(rows[1]))
    assert (lost.is_met, lost.measured) == (False, "reached by no rule")


def test_the_committed_figures_make_a_report(tmp_path: Path) -> None:
    for file in report.REPORTS:
        target = tmp_path / file
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / "docs" / "results" / file).read_bytes())
    assert report.main(["--results", str(tmp_path)]) == 0
    goals = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert all(goal["name"] in text for goal in goals)
    assert text.count("**no**") == sum(not goal["is_met"] for goal in goals)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert text == (ROOT / "docs/results/report.md").read_text()  # the committed one is of the committed figures
