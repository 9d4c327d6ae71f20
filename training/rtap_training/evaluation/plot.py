"""Plot of accuracy against tokens per question, with 95 % intervals."""

# matplotlib's own annotations leave every **kwargs untyped:
# pyright: reportUnknownMemberType=false

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from rtap_training.evaluation.reliability import style_axis
from rtap_training.evaluation.replay import TEXT
from rtap_training.evaluation.results import CHOSEN, Results, Row, TaskResults
from rtap_training.evaluation.rules import ADAPTIVE, CGES, CONFIDENCE, MAJORITY, MODEL, SINGLE, VOTE, WEIGHTED

# Okabe–Ito colours, distinguishable by colour-blind readers; markers repeat the distinction in print.
STYLES: dict[str, tuple[str, str, str]] = {
    CONFIDENCE: ("#0072B2", "o", "confidence"),
    ADAPTIVE: ("#E69F00", "s", "adaptive vote"),
    CGES: ("#56B4E9", "P", "adaptive vote, CGES"),
    MAJORITY: ("#CC3311", "^", "majority vote"),
    WEIGHTED: ("#CC79A7", "<", "weighted vote"),
    VOTE: ("#882255", "v", "vote, live"),
    MODEL: ("#009E73", "D", "the model stops itself"),
    SINGLE: ("#000000", "*", "single cycle"),
}
LINED = (CONFIDENCE, ADAPTIVE, CGES, MAJORITY, WEIGHTED)


def plot_png(results: Results) -> bytes:
    """The plot as a PNG file."""
    output = io.BytesIO()
    trade_off(results.tasks).savefig(output, format="png")
    return output.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as a deterministic SVG file."""
    output = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rtap", "svg.fonttype": "path"}):
        figure.savefig(output, format="svg", metadata={"Date": None})
    return output.getvalue()


def trade_off(tasks: Sequence[TaskResults]) -> Figure:
    """Accuracy against tokens, one panel per task."""
    panels = max(len(tasks), 1)
    figure = Figure(figsize=(6.4 * panels, 5.2), dpi=160, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, task)
    axes[0].set_ylabel("accuracy")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(panels + 1, 3)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _panel(axis: Axes, task: TaskResults) -> None:
    shown = [row for row in task.rows if row.n and not row.label.endswith((TEXT, CHOSEN))]
    for rule in STYLES:
        points = sorted((row for row in shown if row.rule == rule), key=lambda row: row.tokens.value)
        replayed, live = [row for row in points if not row.is_live], [row for row in points if row.is_live]
        if replayed:
            _points(axis, rule, replayed)
        if live:
            _points(axis, rule, live, is_filled=not replayed)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("policy tokens per question (log scale)")
    axis.set_title(f"{task.task}, {task.n} questions", loc="left", fontweight="bold")
    axis.margins(x=0.08)
    style_axis(axis)
    _budget_line(axis, task)


def _points(axis: Axes, rule: str, points: Sequence[Row], *, is_filled: bool = True) -> None:
    """Points of a rule. Live ones beside replayed ones are hollow."""
    colour, marker, label = STYLES[rule]
    tokens, accuracies = [row.tokens for row in points], [row.accuracy for row in points]
    axis.errorbar(
        [t.value for t in tokens],
        [a.value for a in accuracies],
        xerr=[[t.value - t.low for t in tokens], [t.high - t.value for t in tokens]],
        yerr=[[a.value - a.low for a in accuracies], [a.high - a.value for a in accuracies]],
        color=colour,
        ecolor=f"{colour}66",
        elinewidth=1.0,
        linewidth=1.6,
        marker=marker,
        markersize=11 if rule == SINGLE else 6,
        linestyle="-" if rule in LINED and is_filled else "none",
        markerfacecolor=colour if is_filled else "white",
        label=label if is_filled else None,
        zorder=4 if rule in (SINGLE, MODEL) else 3,
    )
    for i, row in enumerate(points):
        text = f"{row.threshold:.2g}" if row.threshold is not None else f"×{row.size}" if row.size else ""
        below = rule == VOTE or (rule == CONFIDENCE and i % 2 == 1)  # alternate sides so that labels do not overlap
        side, shift = ("left", (6, -12)) if below else ("right", (-4, 8))
        at = (row.tokens.value, row.accuracy.value)
        axis.annotate(text, at, ha=side, xytext=shift, textcoords="offset points", fontsize=8, color=colour)


def _budget_line(axis: Axes, task: TaskResults) -> None:
    """Draw the accuracy of the largest majority and the token budget of the threshold."""
    largest = next((row for row in task.rows if row.label == task.majority), None)
    if largest is None:
        return
    axis.axhline(largest.accuracy.value, color=STYLES[MAJORITY][0], linewidth=0.9, linestyle=":", zorder=1)
    position, text = task.budget * largest.tokens.value, f" {task.budget:.0%} of ×{largest.size}'s tokens"
    axis.axvline(position, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
    axis.text(position, 0.015, text, transform=axis.get_xaxis_transform(), fontsize=7.5, color="#555555")
