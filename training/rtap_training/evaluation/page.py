"""Evaluation report as a self-contained HTML page without scripts.

This module selects the content; ``page.html.j2`` renders it.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rtap_core.voting import COUNT_THRESHOLD
from rtap_training.evaluation.comparison import CHOSEN, Row
from rtap_training.evaluation.plot import STYLES, calibration_svg, trade_off_svg
from rtap_training.evaluation.results import Results, TaskResults
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, SINGLE
from rtap_training.evaluation.statistics import Interval

View = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows shown at the top of a task; None for rules that were not measured."""

    single: Row | None
    adaptive: Row | None
    confidence: Row | None
    majority: Row | None


def to_html(results: Results) -> str:
    """Render the page."""
    environment = Environment(
        loader=PackageLoader("rtap_training.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "interval": interval}
    template = environment.get_template("page.html.j2")
    return template.render(
        setting=results.setting,
        facts=facts(results.setting),
        errors=results.errors,
        tasks=[task_view(task, served_threshold(results.setting)) for task in results.tasks],
    )


def served_threshold(setting: Mapping[str, Any]) -> float | None:
    """The server's threshold, if its default policy is the confidence rule."""
    served: Mapping[str, Any] = setting.get("server") or {}
    defaults: Mapping[str, Any] = served.get("defaults") or {}
    return defaults.get("threshold") if defaults.get("policy") == CONFIDENCE else None


def task_view(task: TaskResults, threshold: float | None = None) -> View:
    """Template variables of a task. threshold: that of the server."""
    chosen = choose(task, threshold)
    shown = [row for row in task.rows if row.n]
    low = min((row.accuracy.low for row in shown), default=0.0)
    high = max((row.accuracy.high for row in shown), default=1.0)
    best = chosen.adaptive or chosen.confidence
    return {
        "name": task.task,
        "n": task.n,
        "headline": headline(chosen),
        "cards": cards(chosen),
        "trade_off": data_uri(trade_off_svg(task)),
        "rows": [
            {"r": row, "bar": bar(row.accuracy, low, high), "is_best": row is best, "colour": STYLES[row.rule][0]}
            for row in shown
        ],
        "failed": [(m.spec.label, text, count) for m in task.measurements for text, count in m.error_messages.items()],
        "calibration": data_uri(calibration_svg(task.judgement)) if task.judgement else None,
        "judgement": task.judgement,
        "quality": task.quality,
    }


def choose(task: TaskResults, threshold: float | None = None) -> Chosen:
    """Rows to highlight: single cycle, adaptive vote, chosen (or served) threshold, majority of all samples.

    Live rows come before replayed ones. The most accurate threshold is not highlighted: selected and judged on the same
    questions it would look better than it is."""
    shown = sorted((row for row in task.rows if row.n), key=lambda row: not row.is_live)
    curve = [row for row in shown if row.rule == CONFIDENCE]
    votes = [row for row in shown if row.rule in (ADAPTIVE, CGES)]
    return Chosen(
        single=next((row for row in shown if row.rule == SINGLE), None),
        adaptive=next((row for row in votes if row.threshold == COUNT_THRESHOLD), next(iter(votes), None)),
        confidence=next(
            (row for row in curve if row.label.endswith(CHOSEN)),
            next((row for row in curve if row.threshold == threshold), None),
        ),
        majority=next((row for row in shown if row.label == task.majority), None),
    )


def headline(chosen: Chosen) -> str:
    """One-sentence summary; empty if no rule that stops early was measured."""
    row, majority, single = chosen.adaptive or chosen.confidence, chosen.majority, chosen.single
    if row is None:
        return ""
    cost = f"{row.label} answers {percent(row.accuracy.value)} right with {number(row.tokens.value)} tokens"
    if majority is None:
        return f"{cost} a question."
    share = percent(row.token_ratio.value if row.token_ratio else None, 0)
    once = f"; one pass, {percent(single.accuracy.value)}" if single else ""
    return f"{cost} a question: {share} of what {majority.label} spends for {percent(majority.accuracy.value)}{once}."


def cards(chosen: Chosen) -> list[View]:
    """Cards of the highlighted rows."""
    names = (
        ("One pass", chosen.single),
        ("Adaptive vote", chosen.adaptive),
        ("Stopped by confidence", chosen.confidence),
        ("Majority of all samples", chosen.majority),
    )
    best = chosen.adaptive or chosen.confidence
    return [{"name": name, "r": row, "is_best": row is best} for name, row in names if row is not None]


def bar(value: Interval, low: float, high: float) -> Mapping[str, float]:
    """Position of an interval between ``low`` and ``high``, in percent."""
    width = max(high - low, 1e-9)
    start, middle, end = (100 * (x - low) / width for x in (value.low, value.value, value.high))
    return {"left": round(start, 2), "width": round(end - start, 2), "dot": round(middle, 2)}


def facts(setting: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labelled facts about the setup."""
    load: Mapping[str, Any] = setting.get("load") or {}
    counts: Mapping[str, int] = setting.get("questions") or {}
    versions: Mapping[str, str] = setting.get("versions") or {}
    served: Mapping[str, Any] = setting.get("server") or {}
    models = sorted(map(str, served.get("models") or ()))
    asked = ", ".join(f"{count:,} {task}" for task, count in counts.items())
    known = {
        "Date": str(setting.get("date", ""))[:10],
        "Model": ", ".join(models),
        "Questions": asked,
        "Sampling": f"temperature {load.get('temperature')}, seed {load.get('seed')}" if load else "",
        "At a time": f"{load.get('concurrency')} requests" if load else "",
        "Machine": str(setting.get("machine", "")),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, text) for name, text in known.items() if text]


def data_uri(svg: bytes) -> str:
    """SVG as a data URI."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash for unknown values."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 1) -> str:
    """Fixed decimals; a dash for unknown values."""
    return "–" if value is None or value != value else f"{value:,.{digits}f}"


def interval(value: Interval | None, *, sign: bool = False) -> str:
    """Interval of a share in percent, e.g. ``43.3–52.0``; with ``sign``, of a difference in points."""
    if value is None or value.low != value.low:
        return "–"
    spec = "+.1f" if sign else ".1f"
    middle = " to " if sign else "–"
    return f"{100 * value.low:{spec}}{middle}{100 * value.high:{spec}}"
