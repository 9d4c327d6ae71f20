"""Regression guard: measure the ratios that are committed under docs/results again, shorter, and compare.

Ratios only, never absolute times, so that a slower machine passes. A ratio fails when its whole 95 % interval is worse
than the committed value by more than the tolerance: a short measurement is noisy, and noise alone should not fail it.
Failed requests fail the check whatever the ratios.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_overhead
import bench_rivals
from bench_servers import ROOT, interval_text
from rich.console import Console

from rtap_training.evaluation.statistics import Interval

COMMITTED = ROOT / "docs" / "results"
MEASURED = ROOT / "build" / "bench" / "check"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio under its name. higher_is_better: of throughputs; times and tokens are the other way round."""

    name: str
    value: float
    low: float
    high: float
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ratio as it is committed and as it is now."""

    committed: Ratio
    now: Ratio
    is_worse: bool


def overhead_ratios(report: Mapping[str, Any]) -> Iterator[Ratio]:
    """Of ``overhead.json``: throughput and median times to the first chunk and text, at each concurrency."""
    for level in report["levels"]:
        for figure in level["figures"]:
            if figure["bound"] is not None:
                name = f"overhead, {level['concurrency']} at a time: {figure['name']}"
                yield Ratio(name, **figure["ratio"], higher_is_better=figure["bound"].startswith(">="))


def rivals_ratios(report: Mapping[str, Any]) -> Iterator[Ratio]:
    """Of ``rivals.json``: tokens and time of our rules over those of a majority of 8."""
    for level in report["levels"]:
        for row in level["rows"]:
            if row["rule"].startswith(("single", "confidence", "model")):
                for what in ("tokens", "seconds"):
                    name = f"{level['task']}, {level['at']} at a time: {row['rule']}, {what} over a majority of 8"
                    yield Ratio(name, **row[f"{what}_ratio"], higher_is_better=False)


def failed_requests(report: Mapping[str, Any]) -> int:
    """Of either report: requests without an answer."""
    return sum(
        level.get("errors", 0) + sum(row["failed"] for row in level.get("rows", ())) for level in report["levels"]
    )


def compare(committed: Sequence[Ratio], now: Sequence[Ratio], *, tolerance: float) -> list[Verdict]:
    """Every ratio that both have."""
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
    """Measure and compare. Result: 1 when a ratio is worse, where a request failed, or there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="bench_check.py", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a ratio may be worse")
    args = parser.parse_args(argv)
    kinds = (("overhead.json", overhead_ratios), ("rivals/rivals.json", rivals_ratios))
    committed = [list(ratios(json.loads((COMMITTED / file).read_text("utf-8")))) for file, ratios in kinds]
    bench_overhead.main(
        ["--starts", "3", "--rounds", "2", "--seconds", "2", "--concurrency", "8", "32", "--output", str(MEASURED)]
    )
    only_ours = ["--samples", "--logprob-thresholds"]
    bench_rivals.main(["--concurrency", "32", "--questions", "128", *only_ours, "--output", str(MEASURED)])
    verdicts: list[Verdict] = []
    failed = 0
    for (file, ratios), before in zip(kinds, committed, strict=True):
        report = json.loads((MEASURED / Path(file).name).read_text("utf-8"))
        failed += failed_requests(report)
        verdicts += compare(before, list(ratios(report)), tolerance=args.tolerance)
    console = Console()
    for verdict in verdicts:
        word = "WORSE" if verdict.is_worse else "ok"
        now = interval_text(Interval(verdict.now.value, verdict.now.low, verdict.now.high))
        console.print(f"{word:>5}  {verdict.committed.value:.3f} -> {now}  {verdict.now.name}", markup=False)
    worse = sum(verdict.is_worse for verdict in verdicts)
    console.print(f"{worse} of {len(verdicts)} ratios are worse by over {args.tolerance:.0%}; {failed} requests failed")
    return int(worse > 0 or failed > 0 or not verdicts)


if __name__ == "__main__":
    sys.exit(main())
