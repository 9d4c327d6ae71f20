"""Evaluation report as a self-contained HTML page without scripts.

This module selects the content; ``page.html.j2`` renders it.
"""

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from rtap_core.voting import COUNT_THRESHOLD
from rtap_training.evaluation.plot import STYLES, to_svg, trade_off
from rtap_training.evaluation.reliability import reliability_figure
from rtap_training.evaluation.results import CHOSEN, Results, Row, TaskResults
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, SINGLE
from rtap_training.evaluation.statistics import Interval


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
    defaults: Mapping[str, Any] = (results.setting.get("server") or {}).get("defaults") or {}
    threshold = defaults.get("threshold") if defaults.get("policy") == CONFIDENCE else None
    return environment.get_template("page.html.j2").render(
        setting=results.setting,
        errors=results.errors,
        tasks=[(task, choose(task, threshold), *map(data_uri, _plots(task))) for task in results.tasks],
        colours={rule: colour for rule, (colour, _, _) in STYLES.items()},
    )


def _plots(task: TaskResults) -> tuple[Figure, Figure | None]:
    """Accuracy against tokens, and reliability if there is a confidence."""
    judged = task.judgement
    return trade_off([task]), None if judged is None else reliability_figure({judged.rule: judged.bins})


def data_uri(figure: Figure | None) -> str | None:
    """SVG as a data URI."""
    return None if figure is None else f"data:image/svg+xml;base64,{base64.b64encode(to_svg(figure)).decode()}"


def choose(task: TaskResults, threshold: float | None = None) -> dict[str, Row]:
    """Rows to highlight by role, as far as they were measured. threshold: that of the server.

    Live rows come before replayed ones. The most accurate threshold is not highlighted: selected and judged on the same
    questions it would look better than it is."""
    shown = sorted((row for row in task.rows if row.n), key=lambda row: not row.is_live)
    curve = [row for row in shown if row.rule == CONFIDENCE]
    votes = [row for row in shown if row.rule in (ADAPTIVE, CGES)]
    chosen = [row for row in curve if row.label.endswith(CHOSEN)]
    candidates = {
        "One pass": [row for row in shown if row.rule == SINGLE],
        "Adaptive vote": [*(row for row in votes if row.threshold == COUNT_THRESHOLD), *votes],
        "Stopped by confidence": [*chosen, *(row for row in curve if row.threshold == threshold)],
        "Majority of all samples": [row for row in shown if row.label == task.majority],
    }
    return {role: rows[0] for role, rows in candidates.items() if rows}


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
    spec, middle = ("+.1f", " to ") if sign else (".1f", "–")
    return f"{100 * value.low:{spec}}{middle}{100 * value.high:{spec}}"
