"""Goals of speed with their measured figures, and three pictures.

Reads docs/results/{overhead,rivals/rivals,where/where}.json and writes docs/results/report.{md,json,png}.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from harness import RESULTS, interval_text, write_report
from latency_breakdown import PARTS, Split
from matplotlib.figure import Figure

from rtap_training.evaluation.records import write_atomically
from rtap_training.evaluation.statistics import Interval

REPORTS = ("overhead.json", "rivals/rivals.json", "where/where.json")
SCORING_SHARE, READY_SECONDS = 0.03, 60.0
TOKENS_SHARE, TIME_SHARE = 0.25, 0.33
BELOW = 0.03  # accuracy
LATER_CYCLES = 1.05  # milliseconds a token of the last cycle over the first


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound and its measured value."""

    name: str
    bound: str
    measured: str
    is_met: bool


def goals(overhead: Mapping[str, Any], rivals: Mapping[str, Any], where: Mapping[str, Any]) -> Iterator[Goal]:
    """Every goal that the three reports cover."""
    for level in overhead["levels"]:
        for figure in level["figures"]:
            if figure["bound"] is not None and figure["name"] != "tokens/s":
                name = f"`single` over plain vLLM, {level['concurrency']} at a time: {figure['name']}"
                yield Goal(name, figure["bound"], _interval(figure["ratio"]), figure["is_met"])
    for level in sorted(rivals["levels"], key=lambda level: (level["task"], level["at"])):
        yield from _against_rivals(level)
    for split in _splits(where):
        if split.policy == "confidence":
            share = split.scoring / split.total
            name = f"share of a request that waits for scores, {split.concurrency} at a time"
            yield Goal(name, f"<= {SCORING_SHARE:.0%}", f"{share:.1%}", share <= SCORING_SHARE)
    cycles = where["cycles"]
    ratio = (cycles[-1]["write_ms"] / cycles[-1]["tokens"]) / (cycles[0]["write_ms"] / cycles[0]["tokens"])
    name = f"time a token of cycle {cycles[-1]['cycle']} over cycle 1"
    yield Goal(name, f"<= {LATER_CYCLES}", f"{ratio:.3f}", ratio <= LATER_CYCLES)
    ready = where["start"]["ready_seconds"]
    yield Goal("seconds from command to ready", f"<= {READY_SECONDS:.0f}", f"{ready:.0f}", ready <= READY_SECONDS)


def _against_rivals(level: Mapping[str, Any]) -> Iterator[Goal]:
    """The quickest of our rules that reach the majority's accuracy, against the majority and against optillm.

    A rule reaches it when the lower bound of its 95 % interval is within BELOW."""
    rows = {row["rule"]: row for row in level["rows"]}
    ours = [row for rule, row in rows.items() if rule.startswith(("confidence", "model"))]
    reaching = [row for row in ours if row["accuracy_difference"]["low"] >= -BELOW]
    task = f"{level['task']}, {level['at']} at a time"
    if not reaching:
        yield Goal(f"{task}: accuracy of a majority of 8", f">= -{BELOW} for certain", "reached by no rule", False)
        return
    best = min(reaching, key=lambda row: row["seconds_ratio"]["value"])
    rule = f"{best['rule']}; right {interval_text(Interval(**best['accuracy_difference']), sign='+')}"
    for unit, bound in (("tokens", TOKENS_SHARE), ("seconds", TIME_SHARE)):
        ratio = best[f"{unit}_ratio"]
        name = f"{task}: {unit} of a majority of 8, for its accuracy ({rule})"
        yield Goal(name, f"<= {bound}", _interval(ratio), ratio["value"] <= bound)
    for other, row in rows.items():
        if other.startswith("optillm"):
            ahead = [better(best) >= better(row) for better in (_per_token, _per_second)]
            values = (best["accuracy"]["value"], row["accuracy"]["value"])
            measured = f"{_per_token(best) / _per_token(row):.1f} and {_per_second(best) / _per_second(row):.1f} times"
            name = f"{task}: right answers a token and a second of {best['rule']} over {other} "
            name += f"({values[0]:.1%} and {values[1]:.1%} right)"
            yield Goal(name, "> 1", measured, all(ahead))


def _per_token(row: Mapping[str, Any]) -> float:
    return row["accuracy"]["value"] / row["tokens"]


def _per_second(row: Mapping[str, Any]) -> float:
    return row["accuracy"]["value"] / row["seconds"]


def _interval(value: Mapping[str, float]) -> str:
    return interval_text(Interval(**value))


def _splits(where: Mapping[str, Any]) -> list[Split]:
    return [Split(**split) for split in where["splits"]]


def to_markdown(found: Sequence[Goal], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The report."""
    lines = ["# Goals of speed and measured figures", ""]
    lines += [f"- {file}: {s['date']}, `{s['command']}`" for file, s in settings.items()]
    lines += ["", "![accuracy, scaling, shares](report.png)", "", "| goal | bound | measured [95 %] | met |",
              "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {g.name} | {g.bound} | {g.measured} | {'yes' if g.is_met else '**no**'} |" for g in found]
    return "\n".join(lines) + "\n"


def plot_png(rivals: Mapping[str, Any], where: Mapping[str, Any]) -> bytes:
    """Accuracy over time, throughput over concurrency, the parts of a request, the cost of cycle k."""
    tasks = list(dict.fromkeys(level["task"] for level in rivals["levels"]))
    figure = Figure(figsize=(5 * (len(tasks) + 1), 8), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(tasks) + 1, squeeze=False)
    for column, task in enumerate(tasks):
        levels = [level for level in rivals["levels"] if level["task"] == task]
        _draw_accuracy(axes[0, column], levels[0])
        _draw_scaling(axes[1, column], sorted(levels, key=lambda level: level["at"]))
    _draw_parts(axes[0, -1], _splits(where))
    _draw_cycles(axes[1, -1], where["cycles"])
    output = io.BytesIO()
    cast(Any, figure).savefig(output, format="png")
    return output.getvalue()


def _draw_accuracy(axis: Any, level: Mapping[str, Any]) -> None:
    for number, row in enumerate(level["rows"]):
        marker = "os^D"[number // 10 % 4]  # matplotlib has ten colours
        axis.plot(1000 * row["seconds"], 100 * row["accuracy"]["value"], marker, label=row["rule"])
    axis.set(title=f"{level['task']}, {level['at']} at a time", xlabel="ms a question", ylabel="right, %")
    axis.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_scaling(axis: Any, levels: Sequence[Mapping[str, Any]]) -> None:
    for rule in [row["rule"] for row in levels[0]["rows"]]:
        found = [(level["at"], row["seconds"]) for level in levels for row in level["rows"] if row["rule"] == rule]
        axis.plot(*zip(*((at, 1 / seconds) for at, seconds in found), strict=True), "o-", label=rule)
    axis.set(title=levels[0]["task"], xlabel="requests at a time", ylabel="questions a second", xscale="log")
    at = [level["at"] for level in levels]
    axis.set_xticks(at, labels=[str(number) for number in at])
    axis.minorticks_off()
    axis.legend(fontsize=7)


def _draw_parts(axis: Any, splits: Sequence[Split]) -> None:
    names = [f"{split.policy}\n{split.concurrency} at a time" for split in splits]
    left = [0.0] * len(splits)
    for part in PARTS:
        shares = [100 * getattr(split, part) / split.total for split in splits]
        axis.barh(names, shares, left=left, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set(title="latency breakdown", xlabel="%")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _draw_cycles(axis: Any, cycles: Sequence[Mapping[str, Any]]) -> None:
    numbers = [cycle["cycle"] for cycle in cycles]
    axis.plot(numbers, [cycle["write_ms"] / cycle["tokens"] for cycle in cycles], "o-", label="ms a token")
    axis.plot(numbers, [cycle["recomputed"] for cycle in cycles], "s-", label="recomputed prompt tokens")
    axis.set(title="cost of cycle k", xlabel="cycle", ylim=(0, None))
    axis.legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> int:
    """Read and write. Returns 0 whatever the goals."""
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    overhead, rivals, where = (json.loads((args.results / file).read_text("utf-8")) for file in REPORTS)
    found = list(goals(overhead, rivals, where))
    settings = {file: report["setting"] for file, report in zip(REPORTS, (overhead, rivals, where), strict=True)}
    write_atomically(args.results / "report.png", plot_png(rivals, where))
    write_report(args.results, "report", list(map(asdict, found)), to_markdown(found, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
