"""Reliability plot of a confidence generator: share right against confidence, over a histogram."""

# matplotlib leaves every **kwargs untyped:
# pyright: reportUnknownMemberType=false

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rtap_core.artifact import NUM_BINS
from rtap_training.calibration import Bools, Floats
from rtap_training.evaluation.statistics import wilson_interval

# Okabe–Ito colours, distinguishable by colour-blind readers.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_POOLED = "#000000"


@dataclass(frozen=True, slots=True)
class Bin:
    """One confidence bin. low, high: Wilson 95 % interval of the share right."""

    confidence: float
    right: float
    low: float
    high: float
    cycles: int


def reliability_bins(scores: Floats, labels: Bools, *, bins: int = NUM_BINS) -> list[Bin]:
    """Non-empty equal-width bins, lowest first; the same bins as in the expected calibration error."""
    places = np.minimum((scores * bins).astype(int), bins - 1)
    filled: list[Bin] = []
    for place in range(bins):
        here = places == place
        if here.any():
            share = wilson_interval(int(labels[here].sum()), int(here.sum()))
            filled.append(Bin(float(scores[here].mean()), share.value, share.low, share.high, int(here.sum())))
    return filled


def plot_png(parts: Mapping[str, tuple[Floats, Bools]], title: str) -> bytes:
    """One line per part (scores, labels); the part ``all`` is black with intervals."""
    figure = Figure(figsize=(5.6, 6.4), dpi=160, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _curves(upper, parts)
    upper.set_title(title, loc="left", fontsize=10)
    scores = parts["all"][0]
    lower.hist(scores, bins=NUM_BINS, range=(0, 1), color=_POOLED, alpha=0.6)
    lower.set_ylabel("cycles")
    lower.set_xlabel("confidence")
    output = io.BytesIO()
    figure.savefig(output, format="png")
    return output.getvalue()


def _curves(axis: Axes, parts: Mapping[str, tuple[Floats, Bools]]) -> None:
    axis.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
    for index, (name, (scores, labels)) in enumerate(parts.items()):
        filled = reliability_bins(scores, labels)
        xs, ys = [b.confidence for b in filled], [b.right for b in filled]
        if name == "all":
            errors = np.maximum([[b.right - b.low for b in filled], [b.high - b.right for b in filled]], 0)
            axis.errorbar(xs, ys, yerr=errors, color=_POOLED, marker="o", markersize=4, linewidth=1.6, label=name)
        else:
            axis.plot(xs, ys, color=_COLOURS[index % len(_COLOURS)], marker=".", linewidth=1, label=name)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylabel("cycles that are right")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, loc="upper left")
