"""Evaluation report as a self-contained HTML page without scripts.

This module selects the content; ``page.html.j2`` renders it.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rtap_training.evaluation.measurement import Measurement
from rtap_training.evaluation.plot import STYLES, calibration_svg, trade_off_svg
from rtap_training.evaluation.results import Results, TaskResults
from rtap_training.evaluation.rules import CONFIDENCE, GENERATOR, MAJORITY, SINGLE, VOTE
from rtap_training.evaluation.statistics import Interval

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows shown at the top of a task; None for rules that were not measured."""

    single: Measurement | None
    confidence: Measurement | None
    vote: Measurement | None


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
        tasks=[task_view(task) for task in results.tasks],
    )


def task_view(task: TaskResults) -> Row:
    """Template variables of a task."""
    chosen = choose(task)
    shown = [m for m in task.measurements if m.n]
    low = min((m.accuracy.low for m in shown), default=0.0)
    high = max((m.accuracy.high for m in shown), default=1.0)
    best = chosen.confidence.spec if chosen.confidence else None
    quality = {q.source: q for q in task.quality}
    return {
        "name": task.task,
        "n": max((m.n for m in shown), default=0),
        "headline": headline(chosen),
        "cards": cards(chosen),
        "trade_off": data_uri(trade_off_svg(task)),
        "rows": [
            {"m": m, "bar": bar(m.accuracy, low, high), "is_best": m.spec == best, "colour": STYLES[m.spec.rule][0]}
            for m in shown
        ],
        "failed": [(m.spec.label, text, count) for m in task.measurements for text, count in m.error_messages.items()],
        "versus": task.versus_vote,
        "calibration": data_uri(calibration_svg(task)) if task.judgements else None,
        "judgements": [(j, quality.get(j.source)) for j in task.judgements],
    }


def choose(task: TaskResults) -> Chosen:
    """Select the rows to highlight: single cycle, selected (or most accurate) threshold, largest vote."""
    shown = [m for m in task.measurements if m.n]
    curve = [m for m in shown if m.spec.rule == CONFIDENCE]
    named = task.versus_vote[0].threshold if task.versus_vote else None
    confidence = next((m for m in curve if m.spec.threshold == named), None)
    votes = [m for m in shown if m.spec.rule == MAJORITY] or [
        m for m in shown if m.spec.rule == VOTE and m.spec.scored_by == GENERATOR
    ]
    return Chosen(
        single=next((m for m in shown if m.spec.rule == SINGLE), None),
        confidence=confidence or max(curve, key=lambda m: m.accuracy.value, default=None),
        vote=max(votes, key=lambda m: m.spec.samples or 0, default=None),
    )


def headline(chosen: Chosen) -> str:
    """One-sentence summary; empty if no confidence rule was measured."""
    m, vote, single = chosen.confidence, chosen.vote, chosen.single
    if m is None:
        return ""
    cost = f"{m.spec.label} answers {percent(m.accuracy.value)} right with {number(m.policy_tokens.value)} tokens"
    if vote is None:
        return f"{cost} a question."
    share = percent(m.policy_tokens.value / vote.policy_tokens.value, 0) if vote.policy_tokens.value else "–"
    once = f"; one pass, {percent(single.accuracy.value)}" if single else ""
    return f"{cost} a question: {share} of what {vote.spec.label} spends for {percent(vote.accuracy.value)}{once}."


def cards(chosen: Chosen) -> list[Row]:
    """Cards of the highlighted rows."""
    names = (("One pass", chosen.single), ("Stopped by confidence", chosen.confidence), ("Majority vote", chosen.vote))
    return [{"name": name, "m": m, "is_best": name.startswith("Stopped")} for name, m in names if m is not None]


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
    servers: Mapping[str, Mapping[str, Any]] = setting.get("servers") or {}
    models = sorted({str(name) for served in servers.values() for name in served.get("models") or ()})
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
