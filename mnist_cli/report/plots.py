"""The drawings of a run: curves, calibration, the fit of a regression.

No text from a file is ever drawn: class names and paths stand in the page, which escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mnist_cli.metrics import wilson
from mnist_cli.report.canvas import (
    FIRST,
    MAX_POINTS,
    MUTED,
    PAPER,
    SECOND,
    TEXT,
    WIDTH,
    Curve,
    drawing,
    few_ticks,
    name_ends,
    name_x,
    scale,
    svg,
    thinned,
)


def curves(
    lines: Sequence[Curve], label: str, *, mark: float | None = None, percent: bool = False
) -> Markup:
    """Values over epochs, each line named at its end.

    Args:
        label: what a reader who can't see it is told.
        mark: the epoch to mark on the last line.
        percent: the values are fractions.
    """
    lines = [thinned(line, mark) for line in lines if line.x]
    figure, axes = drawing(right=74)
    values = [y for line in lines for y in line.y]
    scale(axes, "y", values, percent=percent)
    for line in lines:
        dots = "o" if len(line.x) == 1 else None
        axes.plot(line.x, line.y, color=line.ink, marker=dots, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if len(set(values)) == 1:
        axes.margins(y=0.5)
    if mark is not None and mark in lines[-1].x:
        y = lines[-1].y[list(lines[-1].x).index(mark)]
        axes.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.plot([mark], [y], "o", color=lines[-1].ink, markersize=6, markeredgecolor=PAPER)
        share = axes.transAxes.inverted().transform(axes.transData.transform((mark, y)))[0]
        side = "right" if share > 0.5 else "left"
        axes.annotate(
            f"selected: {mark:g}", (mark, 1), xycoords=("data", "axes fraction"), ha=side,
            xytext=(-4 if side == "right" else 4, 2), textcoords="offset points", va="bottom",
            color=MUTED, fontsize=9,
        )  # fmt: skip
    name_ends(axes, lines)
    name_x(axes, "epoch")
    return svg(figure, label)


def rates(x: Sequence[float], y: Sequence[float], label: str) -> Markup:
    """The learning rate of each epoch's last step."""
    line = thinned(Curve("", FIRST, x, y))
    figure, axes = drawing(right=16)
    axes.plot(line.x, line.y, color=MUTED, marker="o" if len(x) == 1 else None, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    axes.set_ylim(min(0, *line.y), 1.15 * max(*line.y, 1e-12))
    name_x(axes, "epoch")
    return svg(figure, label)


def reliability(bins: Sequence[dict[str, Any]], label: str) -> Markup:
    """How often answers of each confidence are right, over how many there are.

    Args:
        bins: of `metrics.calibration_bins`.
    """
    figure, axes = drawing(height=340, bottom=106, left=46, right=16, top=26)
    axes.grid(axis="x")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for part in bins:
        low, high = wilson(part["num_correct"], part["n"])
        axes.plot([part["confidence"]] * 2, [low, high], color=FIRST, linewidth=1.2, alpha=0.55)
    shares = [part["num_correct"] / part["n"] for part in bins]
    axes.plot([part["confidence"] for part in bins], shares, "o", color=FIRST, markersize=4.5)
    below = figure.add_axes((46 / WIDTH, 34 / 340, (WIDTH - 62) / WIDTH, 46 / 340), sharex=axes)
    below.bar(
        [part["confidence"] for part in bins], [part["n"] for part in bins], 0.028, color=FIRST
    )
    below.set_yscale("log")
    below.set_ylim(bottom=0.8)
    below.yaxis.set_major_locator(LogLocator(numticks=3))
    below.yaxis.set_minor_locator(NullLocator())
    below.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.tick_params(labelbottom=False)
    for each in (axes, below):
        each.set_xlim(0, 1.02)
        each.xaxis.set_major_locator(MaxNLocator(5))
        each.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
    for each, name in ((axes, "share that is right"), (below, "number of answers")):
        each.annotate(
            name, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
            va="bottom", color=MUTED, fontsize=9,
        )  # fmt: skip
    name_x(below, "probability of the answer")
    return svg(figure, label)


def intervals(rows: Sequence[tuple[str, str, float, float, float]], label: str) -> Markup:
    """Shares with their intervals, one below the other: (name, ink, low, value, high) each."""
    figure, axes = drawing(height=60 + 34 * len(rows), left=34, right=24, top=16)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    for row, (name, ink, low, value, high) in enumerate(rows):
        axes.plot([low, high], [-row, -row], color=ink, linewidth=2, alpha=0.55)
        axes.plot([value], [-row], "o", color=ink, markersize=6)
        axes.annotate(
            f"{value:.2%}", (value, -row), xytext=(0, 6), textcoords="offset points",
            ha="center", va="bottom", fontsize=9, color=TEXT,
        )  # fmt: skip
        axes.text(-16 / (WIDTH - 58), -row, name, color=ink, va="center", ha="center",
                  fontsize=12, fontweight="bold", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylim(-len(rows) + 0.5, 0.7)
    axes.yaxis.set_major_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))
    axes.margins(x=0.12)
    return svg(figure, label)


def fit(x: Sequence[float], truth: Sequence[float], answers: Sequence[float], label: str) -> Markup:
    """Data of one feature as points and the model's answers as a line."""
    order = sorted(range(len(x)), key=x.__getitem__)
    picked = order[:: math.ceil(len(order) / MAX_POINTS)]
    figure, axes = drawing(right=60)
    xs = [x[index] for index in picked]
    axes.plot(xs, [truth[index] for index in picked], "o", color=MUTED, markersize=2.6, alpha=0.6)
    line = Curve("model", FIRST, xs, [answers[index] for index in picked])
    axes.plot(line.x, line.y, color=line.ink)
    few_ticks(axes)
    name_ends(axes, [line])
    name_x(axes, "input")
    return svg(figure, label)


def agreement(truth: Sequence[float], answers: Sequence[float], label: str) -> Markup:
    """Answers over truth, beside the line where both are equal."""
    step = math.ceil(len(truth) / MAX_POINTS)
    figure, axes = drawing(right=16)
    ends = [min(*truth, *answers), max(*truth, *answers)]
    axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.plot(truth[::step], answers[::step], "o", color=FIRST, markersize=2.6, alpha=0.6)
    few_ticks(axes)
    name_x(axes, "truth")
    return svg(figure, label)


def residuals(answers: Sequence[float], errors: Sequence[float], label: str) -> Markup:
    """Answer minus truth over the answer."""
    step = math.ceil(len(errors) / MAX_POINTS)
    figure, axes = drawing(left=58, right=16)
    axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.plot(answers[::step], errors[::step], "o", color=SECOND, markersize=2.6, alpha=0.6)
    few_ticks(axes)
    name_x(axes, "answer")
    return svg(figure, label)


def spread(errors: Sequence[float], label: str) -> Markup:
    """How many residuals there are of each size."""
    figure, axes = drawing(right=16)
    axes.hist(errors, bins=min(31, 5 + len(errors) // 10), color=SECOND, alpha=0.8)
    few_ticks(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    name_x(axes, "answer minus truth")
    return svg(figure, label)
