"""Evaluation report as a self-contained HTML page without scripts.

This module selects the content; ``page.html.j2`` renders it.
"""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rtap_core.voting import COUNT_THRESHOLD
from rtap_training.evaluation.comparison import CHOSEN, Row
from rtap_training.evaluation.plot import STYLES, calibration_svg, trade_off_svg
from rtap_training.evaluation.records import ADAPTIVE, CGES, CONFIDENCE, SINGLE
from rtap_training.evaluation.results import Results, TaskResults
from rtap_training.evaluation.statistics import Interval

View = dict[str, Any]


ONE_PASS, ADAPTIVE_VOTE, BY_CONFIDENCE, MAJORITY_OF_ALL = (
    "One pass",
    "Adaptive vote",
    "Stopped by confidence",
    "Majority of all samples",
)


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
    return environment.get_template("page.html.j2").render(
        setting=results.setting,
        facts=facts(results.setting),
        errors=results.errors,
        tasks=[task_view(task, served_threshold(results.setting)) for task in results.tasks],
    )


def served_threshold(setting: Mapping[str, Any]) -> float | None:
    """The server's threshold, if its default policy is the confidence rule."""
    defaults: Mapping[str, Any] = (setting.get("server") or {}).get("defaults") or {}
    return defaults.get("threshold") if defaults.get("policy") == CONFIDENCE else None


def task_view(task: TaskResults, threshold: float | None = None) -> View:
    """Template variables of a task. threshold: that of the server."""
    chosen = choose(task, threshold)
    best = best_of(chosen)
    shown = [row for row in task.rows if row.n]
    low = min((row.accuracy.low for row in shown), default=0.0)
    high = max((row.accuracy.high for row in shown), default=1.0)
    return {
        "name": task.task,
        "n": task.n,
        "headline": headline(chosen),
        "cards": [{"name": name, "r": row, "is_best": row is best} for name, row in chosen.items()],
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


def choose(task: TaskResults, threshold: float | None = None) -> dict[str, Row]:
    """Rows to highlight: single cycle, adaptive vote, chosen (or served) threshold, majority of all samples, as far as
    they were measured.

    Live rows come before replayed ones. The most accurate threshold is not highlighted: selected and judged on the same
    questions it would look better than it is."""
    shown = sorted((row for row in task.rows if row.n), key=lambda row: not row.is_live)
    curve = [row for row in shown if row.rule == CONFIDENCE]
    votes = [row for row in shown if row.rule in (ADAPTIVE, CGES)]
    candidates = {
        ONE_PASS: [row for row in shown if row.rule == SINGLE],
        ADAPTIVE_VOTE: [*(row for row in votes if row.threshold == COUNT_THRESHOLD), *votes],
        BY_CONFIDENCE: [
            *(row for row in curve if row.label.endswith(CHOSEN)),
            *(row for row in curve if row.threshold == threshold),
        ],
        MAJORITY_OF_ALL: [row for row in shown if row.label == task.majority],
    }
    return {name: rows[0] for name, rows in candidates.items() if rows}


def best_of(chosen: Mapping[str, Row]) -> Row | None:
    """The rule to recommend: the adaptive vote, else the threshold."""
    return chosen.get(ADAPTIVE_VOTE) or chosen.get(BY_CONFIDENCE)


def headline(chosen: Mapping[str, Row]) -> str:
    """One-sentence summary; empty if no rule that stops early was measured."""
    row, majority, single = (
        chosen.get(ADAPTIVE_VOTE) or chosen.get(BY_CONFIDENCE),
        chosen.get(MAJORITY_OF_ALL),
        chosen.get(ONE_PASS),
    )
    if row is None:
        return ""
    cost = f"{row.label} answers {percent(row.accuracy.value)} right with {number(row.tokens.value)} tokens a question"
    if majority is None:
        return f"{cost}."
    share = percent(row.token_ratio and row.token_ratio.value, 0)
    once = f"; one pass, {percent(single.accuracy.value)}" if single else ""
    return f"{cost}: {share} of what {majority.label} spends for {percent(majority.accuracy.value)}{once}."


def bar(value: Interval, low: float, high: float) -> Mapping[str, float]:
    """Position of an interval between ``low`` and ``high``, in percent."""
    width = max(high - low, 1e-9)
    start, middle, end = (100 * (x - low) / width for x in (value.low, value.value, value.high))
    return {"left": round(start, 2), "width": round(end - start, 2), "dot": round(middle, 2)}


def facts(setting: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labelled facts about the setup."""
    load: Mapping[str, Any] = setting.get("load") or {}
    known = {
        "Date": str(setting.get("date", ""))[:10],
        "Model": ", ".join(sorted(map(str, (setting.get("server") or {}).get("models") or ()))),
        "Questions": ", ".join(f"{count:,} {task}" for task, count in (setting.get("questions") or {}).items()),
        "Sampling": f"temperature {load.get('temperature')}, seed {load.get('seed')}" if load else "",
        "At a time": f"{load.get('concurrency')} requests" if load else "",
        "Machine": str(setting.get("machine", "")),
        "Versions": ", ".join(f"{name} {version}" for name, version in (setting.get("versions") or {}).items()),
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
