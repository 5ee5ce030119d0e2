"""The drawings of a sweep: what each key does, parallel coordinates, curves, a search's course."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, NullLocator

from mnist_cli import formats
from mnist_cli.report.canvas import (
    FIRST,
    GRID,
    MUTED,
    PAPER,
    SECOND,
    TEXT,
    Curve,
    drawing,
    name_ends,
    name_x,
    scale,
    svg,
    thinned,
    word,
)
from mnist_cli.report.sweep_axes import (
    Axis,
    Dot,
    apart,
    axis_of_numbers,
    choices,
    moved,
    range_of,
    short,
)
from mnist_cli.sweep import display

MAX_CHOICES = 16  # of a key that is drawn
MAX_CURVE_POINTS = 8000  # of all curves in a drawing
WIDE = 400  # of a drawing that stands alone, in pixels
MAX_WIDTH, MAX_GAP = 960, 210  # of parallel coordinates, in pixels, and between two of them


class Ending(NamedTuple):
    """A curve over epochs, and how it ended.

    Attributes:
        name: at the end of the curve, one of this program's words; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_done: bool
    is_winner: bool


# --- what a key does -----------------------------------------------------------------------------


def effect_of_choices(metric: str, dots: Sequence[Dot], label: str) -> Markup:
    """A strip of scores for each choice, with their median and, of five or more, the quartiles."""
    low, high = range_of(dots)
    names = choices([dot.value for dot in dots])
    figure, axes = drawing(height=74 + 30 * len(names), left=92, right=62, top=20)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    scale(axes, "x", [low, high], percent=_is_share(metric))
    for row, name in enumerate(names):
        strip = [dot for dot in dots if display.cell(dot.value) == name]
        _strip(axes, row, strip, low, high)
        axes.annotate(
            word(row), (0, row), xycoords=("axes fraction", "data"), xytext=(-8, 0),
            textcoords="offset points", ha="right", va="center", fontsize=9,
        )  # fmt: skip
        done = [dot.score for dot in strip if dot.is_done]
        if done:
            axes.annotate(
                formats.metric(metric, statistics.median(done)), (1, row),
                xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                ha="left", va="center", fontsize=9, color=MUTED,
            )  # fmt: skip
    axes.annotate(
        "median", (1, 1), xycoords="axes fraction", xytext=(8, 4), textcoords="offset points",
        va="bottom", color=MUTED, fontsize=9,
    )  # fmt: skip
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.margins(x=0.05)
    axes.yaxis.set_major_locator(NullLocator())
    name_x(axes, metric)
    return svg(figure, label, [short(name) for name in names])


def _strip(axes: Axes, row: int, dots: Sequence[Dot], low: float, high: float) -> None:
    done = [moved(dot.score, low, high) for dot in dots if dot.is_done]
    if len(done) >= 5:
        first, _, third = statistics.quantiles(done, n=4, method="inclusive")
        axes.plot([first, third], [row, row], color=FIRST, linewidth=13, alpha=0.16,
                  solid_capstyle="butt")  # fmt: skip
    if done:
        axes.plot([statistics.median(done)] * 2, [row - 0.3, row + 0.3], color=TEXT, linewidth=1.4)
    for place, dot in enumerate(dots):
        spread = 0.0 if len(dots) == 1 else 0.22 * ((place * 0.618034) % 1 - 0.5) * 2
        score = moved(dot.score, low, high)
        _dot(axes, score, row + spread, dot, score != dot.score)


def effect_of_number(metric: str, dots: Sequence[Dot], label: str) -> Markup:
    """Scores over the values of a key; a line joins the medians of values that come again."""
    dots = [dot for dot in dots if dot.value is not None]
    low, high = range_of(dots)
    figure, axes = drawing(right=20, left=52)
    keys = axis_of_numbers("", [float(dot.value) for dot in dots])  # type: ignore[arg-type]
    scale(axes, "y", [low, high], percent=_is_share(metric))
    columns: dict[float, list[float]] = {}
    for place, dot in zip(keys.places, dots, strict=True):
        if dot.is_done:
            columns.setdefault(place, []).append(moved(dot.score, low, high))
    if len(columns) > 1 and sum(map(len, columns.values())) >= 1.5 * len(columns):
        line = sorted((place, statistics.median(scores)) for place, scores in columns.items())
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1, alpha=0.7)
    for place, dot in zip(keys.places, dots, strict=True):
        score = moved(dot.score, low, high)
        _dot(axes, place, score, dot, score != dot.score)
    ticks = sorted(apart(keys.ticks, 0.12))
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.margins(0.05)
    return svg(figure, label)


def _dot(axes: Axes, x: float, y: float, dot: Dot, is_moved: bool) -> None:
    """A cross for what was not completed; hollow where it was moved to the edge."""
    if not dot.is_done:
        axes.plot([x], [y], "x", color=MUTED, markersize=4, markeredgewidth=1, alpha=0.8)
    elif dot.is_winner:
        axes.plot([x], [y], "o", color=SECOND, markersize=7, markeredgecolor=PAPER, zorder=5)
    else:
        axes.plot([x], [y], "o", color=FIRST, markersize=4.5, alpha=0.6,
                  markeredgewidth=1 if is_moved else 0, fillstyle="none" if is_moved else "full",
                  )  # fmt: skip


def _is_share(metric: str) -> bool:
    return "accuracy" in metric


# --- parallel coordinates ------------------------------------------------------------------------


def parallel(axes: Sequence[Axis], label: str) -> Markup:
    """A line for each configuration, from axis to axis; the first one is the winner's.

    The better a configuration is, the stronger is its line: they come best first.
    """
    width = 134 + (len(axes) - 1) * min(MAX_GAP, (MAX_WIDTH - 134) // (len(axes) - 1))
    figure, plane = drawing(width=width, height=300, left=62, right=72, top=20, bottom=40)
    count = len(axes[0].places)
    faintest = 0.4 if count <= 12 else 0.12
    for row in reversed(range(count)):
        corners = [(float(x), axis.places[row]) for x, axis in enumerate(axes)]
        points, codes = [corners[0]], [Path.MOVETO]
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            points += [(x0 + 0.42, y0), (x1 - 0.42, y1), (x1, y1)]
            codes += [Path.CURVE4] * 3
        is_winner = row == 0
        strength = 1 - row / max(1, count - 1)
        plane.add_patch(
            PathPatch(
                Path(points, codes), fill=False, clip_on=False, capstyle="round",
                edgecolor=SECOND if is_winner else FIRST, linewidth=2.4 if is_winner else 1.2,
                alpha=1 if is_winner else faintest + (0.8 - faintest) * strength**2,
            )
        )  # fmt: skip
    words: list[str] = []
    for x, axis in enumerate(axes):
        plane.plot([x, x], [0, 1], color=MUTED, linewidth=0.8, zorder=3, clip_on=False)
        is_last = x == len(axes) - 1
        for place, text in apart(axis.ticks, 0.05):
            plane.annotate(
                word(len(words)), (x, place), xytext=(5 if is_last else -5, 0),
                textcoords="offset points", ha="left" if is_last else "right", va="center",
                fontsize=9, zorder=4, annotation_clip=False,
            )  # fmt: skip
            words.append(text)
        plane.annotate(
            word(len(words)), (x, 0), xytext=(0, -16), textcoords="offset points", ha="center",
            va="top", fontsize=9, color=MUTED, annotation_clip=False,
        )  # fmt: skip
        words.append(short(axis.name, 20))
    plane.set(xlim=(0, len(axes) - 1), ylim=(-0.06, 1.06))
    plane.axis("off")
    return svg(figure, label, words)


# --- curves --------------------------------------------------------------------------------------


def curves(lines: Sequence[Ending], label: str, *, percent: bool = False) -> Markup:
    """Many curves over epochs, the winner's on top; a cross ends each that was not completed.

    Args:
        percent: the values are fractions.
    """
    limit = max(24, MAX_CURVE_POINTS // len(lines))
    figure, axes = drawing(right=74)
    done = [y for line in lines if line.is_done for y in line.y]
    values = done or [y for line in lines for y in line.y]
    scale(axes, "y", values, percent=percent)
    crowded = 0.8 if len(lines) <= 12 else 0.4
    for line in sorted(lines, key=lambda line: (line.is_winner, line.is_done)):
        ink = SECOND if line.is_winner else FIRST if line.is_done else MUTED
        thin = thinned(Curve("", ink, line.x, line.y), limit=limit)
        dots = "o" if len(thin.x) == 1 and line.is_done else None
        axes.plot(
            thin.x, thin.y, color=ink, marker=dots, markersize=3, zorder=4 if line.is_winner else 2,
            linewidth=2.2 if line.is_winner else 1, alpha=1 if line.is_winner else crowded,
        )  # fmt: skip
        if not line.is_done:
            axes.plot(line.x[-1:], line.y[-1:], "x", color=ink, markersize=4.5, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if len(set(values)) == 1:
        axes.margins(y=0.5)
    elif done:  # what diverged leaves the picture
        axes.set_ylim(*_limits(done, axes.get_yscale() == "log"))
    ends = [
        Curve(line.name, SECOND if line.is_winner else FIRST, line.x, line.y)
        for line in lines
        if line.name
    ]
    name_ends(axes, ends)
    name_x(axes, "epoch")
    return svg(figure, label)


def _limits(values: Sequence[float], is_log: bool) -> tuple[float, float]:
    """Lowest and highest, and a little room; of logarithms without a loss that exploded once."""
    if not is_log:
        room = 0.04 * (max(values) - min(values))
        return min(values) - room, max(values) + room
    logs = [math.log(value) for value in values]
    first, _, third = statistics.quantiles(logs, n=4, method="inclusive")
    low, high = min(logs), min(max(logs), third + 3 * (third - first))
    return math.exp(low - 0.04 * (high - low)), math.exp(high + 0.04 * (high - low))


# --- searches ------------------------------------------------------------------------------------


def history(
    metric: str, trials: Sequence[Dot], num_trials: int, is_higher_better: bool, label: str
) -> Markup:
    """The score of each trial, and the best one until then.

    Args:
        trials: with their number as value, in this order; one of them is completed at least.
    """
    figure, axes = drawing(width=WIDE, left=52, right=52)
    low, high = range_of(trials)
    scale(axes, "y", [low, high], percent=_is_share(metric))
    best: list[tuple[float, float]] = []
    for dot in trials:
        number, score = float(dot.value), moved(dot.score, low, high)  # type: ignore[arg-type]
        _dot(axes, number, score, dot, score != dot.score)
        if dot.is_done:
            is_better = not best or (score > best[-1][1]) == is_higher_better
            best.append((number, score if is_better else best[-1][1]))
    best.append((max(num_trials - 1, best[-1][0]), best[-1][1]))
    line = Curve("best", SECOND, *zip(*best, strict=True))
    axes.plot(line.x, line.y, color=SECOND, drawstyle="steps-post", zorder=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    name_ends(axes, [line])
    name_x(axes, "trial")
    return svg(figure, label)


def front(
    names: tuple[str, str],
    points: Sequence[tuple[float, float, bool]],
    label: str,
) -> Markup:
    """Trials by two objectives; those of the front, whose third value is True, are joined."""
    figure, axes = drawing(width=WIDE, height=260, left=58, right=20, top=30)
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    scale(axes, "x", xs, percent=_is_share(names[0]))
    scale(axes, "y", ys, percent=_is_share(names[1]))
    best = sorted((x, y) for x, y, is_best in points if is_best)
    axes.grid(color=GRID)
    rest = [(x, y) for x, y, is_best in points if not is_best]
    if rest:
        axes.plot(*zip(*rest, strict=True), "o", color=MUTED, markersize=4, alpha=0.6)
    if best:
        axes.plot(*zip(*best, strict=True), color=SECOND, linewidth=1, alpha=0.6)
        axes.plot(*zip(*best, strict=True), "o", color=SECOND, markersize=6, markeredgecolor=PAPER)
    axes.margins(0.06)
    axes.annotate(
        names[1], (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points",
        va="bottom", color=MUTED, fontsize=9,
    )  # fmt: skip
    name_x(axes, names[0])
    return svg(figure, label)
