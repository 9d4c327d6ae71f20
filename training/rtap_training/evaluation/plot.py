"""Plots: accuracy against tokens per question, and share right against confidence, with 95 % intervals."""

# matplotlib's own annotations leave every **kwargs untyped:
# pyright: reportUnknownMemberType=false

import io
from collections.abc import Sequence
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from rtap_training.evaluation.measurement import Measurement
from rtap_training.evaluation.results import Results, TaskResults
from rtap_training.evaluation.rules import (
    CONFIDENCE,
    GENERATOR,
    LOGPROB,
    MAJORITY,
    MODEL,
    OWN_SERVER,
    SINGLE,
    VOTE,
    YESNO,
)

# Okabe–Ito colours, distinguishable by colour-blind readers; markers repeat the distinction in print.
STYLES: dict[str, tuple[str, str, str]] = {
    CONFIDENCE: ("#0072B2", "o", "confidence (each threshold)"),
    LOGPROB: ("#E69F00", "s", "logprob rule (each threshold)"),
    YESNO: ("#56B4E9", "P", "yes/no question to the model (each threshold)"),
    MAJORITY: ("#CC3311", "^", "majority vote"),
    VOTE: ("#882255", "v", "vote as the server weighs it"),
    MODEL: ("#009E73", "D", "the model stops itself"),
    SINGLE: ("#000000", "*", "single cycle"),
}
LINED = (CONFIDENCE, *OWN_SERVER, MAJORITY)


def plot_png(results: Results) -> bytes:
    """The plot as a PNG file."""
    output = io.BytesIO()
    _trade_off(results.tasks).savefig(output, format="png")
    return output.getvalue()


def trade_off_svg(task: TaskResults) -> bytes:
    """One task's panel as a deterministic SVG file."""
    return _svg(_trade_off([task]))


def calibration_svg(task: TaskResults) -> bytes:
    """Reliability plot of one task as an SVG file, one curve per kind of confidence."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1, label="perfectly calibrated")
    for judgement in task.judgements:
        colour, marker, _ = STYLES[CONFIDENCE if judgement.source == GENERATOR else judgement.source]
        bins = judgement.bins
        axis.errorbar(
            [b.confidence for b in bins],
            [b.right for b in bins],
            yerr=[[max(b.right - b.low, 0) for b in bins], [max(b.high - b.right, 0) for b in bins]],
            color=f"{colour}55",
            ecolor=f"{colour}66",
            elinewidth=1.0,
            linewidth=1.2,
        )
        axis.scatter(
            [b.confidence for b in bins],
            [b.right for b in bins],
            s=[24 + 900 * b.cycles / judgement.answers for b in bins],
            color=f"{colour}cc",
            edgecolors="white",
            marker=marker,
            label=f"{judgement.source}, {judgement.answers:,} answers",
            zorder=4,
        )
    axis.set_xlim(-0.06, 1.06)
    axis.set_ylim(-0.06, 1.06)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("confidence")
    axis.set_ylabel("answers that are right")
    _style_axis(axis)
    for handle in axis.legend(frameon=False, loc="upper left").legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([40])  # not the size of the first bin
    return _svg(figure)


def _svg(figure: Figure) -> bytes:
    output = io.BytesIO()
    with cast(Any, matplotlib).rc_context({"svg.hashsalt": "rtap", "svg.fonttype": "path"}):
        figure.savefig(output, format="svg", metadata={"Date": None})
    return output.getvalue()


def _style_axis(axis: Axes) -> None:
    axis.grid(which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _trade_off(tasks: Sequence[TaskResults]) -> Figure:
    panels = max(len(tasks), 1)
    figure = Figure(figsize=(6.4 * panels, 5.2), dpi=160, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, task)
    axes[0].set_ylabel("accuracy")
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(panels + 1, 3), frameon=False
        )
    return figure


def _panel(axis: Axes, task: TaskResults) -> None:
    shown = [m for m in task.measurements if m.n and not (m.spec.rule == VOTE and m.spec.scored_by != GENERATOR)]
    for rule in STYLES:
        points = sorted((m for m in shown if m.spec.rule == rule), key=lambda m: m.policy_tokens.value)
        # a vote of one sample equals the single cycle
        points = [m for m in points if not (m.spec.rule == MAJORITY and m.spec.samples == 1)]
        if points:
            _points(axis, rule, points)
    _from_single(axis, shown)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("policy tokens per question (log scale)")
    n = max((m.n for m in shown), default=0)
    axis.set_title(f"{task.task}, {n} questions", loc="left", fontweight="bold")
    axis.margins(x=0.08)
    _style_axis(axis)
    _budget_line(axis, task)


def _from_single(axis: Axes, shown: Sequence[Measurement]) -> None:
    """Extend the curve of thresholds to the single cycle, which equals threshold 0."""
    single = [m for m in shown if m.spec.rule == SINGLE]
    curve = sorted((m for m in shown if m.spec.rule == CONFIDENCE), key=lambda m: m.policy_tokens.value)
    ends = [*single[:1], *curve[:1]]
    if len(ends) == 2:
        xs, ys = [m.policy_tokens.value for m in ends], [m.accuracy.value for m in ends]
        axis.plot(xs, ys, color=STYLES[CONFIDENCE][0], linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)


def _points(axis: Axes, rule: str, points: Sequence[Measurement]) -> None:
    colour, marker, label = STYLES[rule]
    tokens, accuracies = [m.policy_tokens for m in points], [m.accuracy for m in points]
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
        linestyle="-" if rule in LINED else "none",
        label=label,
        zorder=4 if rule in (SINGLE, MODEL) else 3,
    )
    for i, m in enumerate(
        points if rule not in OWN_SERVER else ()
    ):  # their thresholds are quantiles, not worth a label
        spec = m.spec
        text = f"{spec.threshold:.2g}" if spec.threshold is not None else f"×{spec.samples}" if spec.samples else ""
        below = rule == VOTE or (rule == CONFIDENCE and i % 2 == 1)  # alternate sides so that labels do not overlap
        axis.annotate(
            text,
            (m.policy_tokens.value, m.accuracy.value),
            ha="left" if below else "right",
            xytext=(6, -12) if below else (-4, 8),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def _budget_line(axis: Axes, task: TaskResults) -> None:
    """Draw the accuracy of the largest majority and the token budget of the threshold."""
    votes = [m for m in task.measurements if m.spec.rule == MAJORITY and m.n]
    if not votes or not task.versus_vote:
        return
    largest = max(votes, key=lambda m: m.spec.samples or 0)
    budget = task.versus_vote[0].budget
    axis.axhline(largest.accuracy.value, color=STYLES[MAJORITY][0], linewidth=0.9, linestyle=":", zorder=1)
    position = budget * largest.policy_tokens.value
    axis.axvline(position, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
    axis.annotate(
        f"{budget:.0%} of ×{largest.spec.samples}'s tokens",
        (position, 0.01),
        xycoords=("data", "axes fraction"),
        xytext=(3, 2),
        textcoords="offset points",
        fontsize=7.5,
        color="#555555",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )
