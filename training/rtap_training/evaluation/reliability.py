"""Reliability plot of confidences: share right against confidence."""

# matplotlib leaves every **kwargs untyped:
# pyright: reportUnknownMemberType=false

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rtap_training.evaluation.calibration import Bools, Floats
from rtap_training.evaluation.statistics import Bin, reliability_bins

# Okabe–Ito colours, distinguishable by colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000")


def reliability_figure(curves: Mapping[str, Sequence[Bin]], title: str = "") -> Figure:
    """One curve per name, with intervals; larger points stand for more answers."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1, label="perfectly calibrated")
    for number, (name, bins) in enumerate(curves.items()):
        colour, answers = COLOURS[number % len(COLOURS)], sum(b.cycles for b in bins)
        xs, ys = [b.confidence for b in bins], [b.right for b in bins]
        errors = np.maximum([[b.right - b.low for b in bins], [b.high - b.right for b in bins]], 0)
        axis.errorbar(xs, ys, yerr=errors, color=colour, alpha=0.4, linewidth=1.2, label=f"{name}, {answers:,} answers")
        axis.scatter(xs, ys, s=[24 + 900 * b.cycles / answers for b in bins], color=f"{colour}cc", edgecolors="white")
    axis.set_xlim(-0.06, 1.06)
    axis.set_ylim(-0.06, 1.06)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("confidence")
    axis.set_ylabel("answers that are right")
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(frameon=False, loc="upper left")
    style_axis(axis)
    return figure


def plot_png(parts: Mapping[str, tuple[Floats, Bools]], title: str) -> bytes:
    """PNG of one curve per part (scores, labels)."""
    curves = {name: reliability_bins(scores, labels) for name, (scores, labels) in parts.items()}
    output = io.BytesIO()
    reliability_figure(curves, title).savefig(output, format="png", dpi=160)
    return output.getvalue()


def style_axis(axis: Axes) -> None:
    """A light grid, and no frame at the top and right."""
    axis.grid(which="major", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
