"""Regression guard: measure the ratios under docs/results again, shorter, and compare.

Ratios only, never absolute times. A ratio fails when its whole 95 % interval is worse than the committed value by more
than the tolerance. Failed requests fail the check.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import overhead
import rivals
from harness import RESULTS, ROOT, interval_text

from rtap_training.evaluation.statistics import Interval

MEASURED = ROOT / "build" / "bench" / "check"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A named ratio. higher_is_better: True for throughputs."""

    name: str
    value: float
    low: float
    high: float
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """A committed ratio and its new value."""

    committed: Ratio
    now: Ratio
    is_worse: bool


def overhead_ratios(report: Mapping[str, Any]) -> Iterator[Ratio]:
    """Ratios with a goal in ``overhead.json``."""
    for level in report["levels"]:
        for figure in level["figures"]:
            if figure["bound"] is not None:
                name = f"overhead, {level['concurrency']} at a time: {figure['name']}"
                yield Ratio(name, **figure["ratio"], higher_is_better=figure["bound"].startswith(">="))


def rivals_ratios(report: Mapping[str, Any]) -> Iterator[Ratio]:
    """Tokens and time of our rules over a majority of 8, from ``rivals.json``."""
    for level in report["levels"]:
        for row in level["rows"]:
            if row["rule"].startswith(("single", "confidence", "model")):
                for unit in ("tokens", "seconds"):
                    name = f"{level['task']}, {level['at']} at a time: {row['rule']}, {unit} over a majority of 8"
                    yield Ratio(name, **row[f"{unit}_ratio"], higher_is_better=False)


def failed_requests(report: Mapping[str, Any]) -> int:
    """Requests without an answer in either report."""
    return sum(
        level.get("errors", 0) + sum(row["failed"] for row in level.get("rows", ())) for level in report["levels"]
    )


def compare(committed: Sequence[Ratio], now: Sequence[Ratio], *, tolerance: float) -> list[Verdict]:
    """Verdicts on every ratio that both have."""
    known = {ratio.name: ratio for ratio in committed}
    verdicts: list[Verdict] = []
    for ratio in now:
        before = known.get(ratio.name)
        if before is not None:
            if ratio.higher_is_better:
                is_worse = ratio.high < before.value * (1 - tolerance)
            else:
                is_worse = ratio.low > before.value * (1 + tolerance)
            verdicts.append(Verdict(before, ratio, is_worse))
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare. Returns 1 when a ratio is worse, a request failed, or nothing was comparable."""
    parser = argparse.ArgumentParser(prog="check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a ratio may be worse")
    args = parser.parse_args(argv)
    kinds = (("overhead.json", overhead_ratios), ("rivals/rivals.json", rivals_ratios))
    committed = [list(ratios(json.loads((RESULTS / file).read_text("utf-8")))) for file, ratios in kinds]
    overhead.main(
        ["--starts", "3", "--rounds", "2", "--seconds", "2", "--concurrency", "8", "32", "--output", str(MEASURED)]
    )
    only_ours = ["--samples", "--logprob-thresholds"]
    rivals.main(["--concurrency", "32", "--questions", "128", *only_ours, "--output", str(MEASURED)])
    verdicts: list[Verdict] = []
    failed = 0
    for (file, ratios), before in zip(kinds, committed, strict=True):
        report = json.loads((MEASURED / Path(file).name).read_text("utf-8"))
        failed += failed_requests(report)
        verdicts += compare(before, list(ratios(report)), tolerance=args.tolerance)
    for verdict in verdicts:
        word = "WORSE" if verdict.is_worse else "ok"
        now = interval_text(Interval(verdict.now.value, verdict.now.low, verdict.now.high))
        print(f"{word:>5}  {verdict.committed.value:.3f} -> {now}  {verdict.now.name}")
    worse = sum(verdict.is_worse for verdict in verdicts)
    print(f"{worse} of {len(verdicts)} ratios are worse by over {args.tolerance:.0%}; {failed} requests failed")
    return int(worse > 0 or failed > 0 or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
