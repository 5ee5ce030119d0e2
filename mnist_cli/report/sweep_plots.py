"""The drawings of a sweep: what each key does, parallel coordinates, curves, a search's course."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mnist_cli.errors import one_line
from mnist_cli.report.canvas import (
    FIRST,
    GRID,
    MUTED,
    PAPER,
    SECOND,
    TEXT,
    Line,
    drawing,
    is_wide,
    name_ends,
    name_x,
    scale,
    svg,
    thinned,
    word,
)
from mnist_cli.report.sweep_record import Value
from mnist_cli.run import LARGEST_METRIC
from mnist_cli.sweep import leaderboard

MAX_CHOICES = 16  # of a key that is drawn
MIN_FOR_RANGE = 5  # completed configurations that set the range of an axis
MAX_CURVE_POINTS = 8000  # of all curves in a drawing
WIDE = 400  # of a drawing that stands alone, in pixels
MAX_WIDTH, MAX_GAP = 960, 210  # of parallel coordinates, in pixels, and between two of them


class Dot(NamedTuple):
    """A configuration: the value of a key, and what came of it.

    Attributes:
        is_done: False for one that was given up or cut off; `score` is its best until then.
    """

    value: Value
    score: float
    is_done: bool
    is_winner: bool


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


def is_number(value: Value) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) <= LARGEST_METRIC  # type: ignore[arg-type]


def are_numbers(values: Sequence[Value]) -> bool:
    """Whether a key has a scale: its values are numbers, but for where it doesn't apply."""
    given = [value for value in values if value is not None]
    return bool(given) and all(map(is_number, given))


def choices(values: Sequence[Value]) -> list[str]:
    """The distinct values as texts, in the order in which people count: 8, 16, 128."""
    return sorted(set(map(leaderboard.cell, values)), key=_natural)


def short(text: str, limit: int = 16) -> str:
    """`text` as far as a drawing has room for it."""
    text = one_line(text, 1000)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def digits(value: float) -> str:
    """A number with four digits, a whole one with all of them."""
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e7 else f"{value:.4g}"


def _natural(text: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]{1,30})", text)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


# --- what a key does -----------------------------------------------------------------------------


def effect_of_choices(metric: str, dots: Sequence[Dot], label: str) -> Markup:
    """A strip of scores for each choice, with their median and, of five or more, the quartiles."""
    low, high = _range(dots)
    names = choices([dot.value for dot in dots])
    figure, axes = drawing(height=74 + 30 * len(names), left=92, right=62, top=20)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    scale(axes, "x", [low, high], percent=_is_share(metric))
    for row, name in enumerate(names):
        strip = [dot for dot in dots if leaderboard.cell(dot.value) == name]
        _strip(axes, row, strip, low, high)
        axes.annotate(
            word(row), (0, row), xycoords=("axes fraction", "data"), xytext=(-8, 0),
            textcoords="offset points", ha="right", va="center", fontsize=9,
        )  # fmt: skip
        done = [dot.score for dot in strip if dot.is_done]
        if done:
            axes.annotate(
                leaderboard.number(metric, statistics.median(done)), (1, row),
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
    done = [_moved(dot.score, low, high) for dot in dots if dot.is_done]
    if len(done) >= 5:
        first, _, third = statistics.quantiles(done, n=4, method="inclusive")
        axes.plot([first, third], [row, row], color=FIRST, linewidth=13, alpha=0.16,
                  solid_capstyle="butt")  # fmt: skip
    if done:
        axes.plot([statistics.median(done)] * 2, [row - 0.3, row + 0.3], color=TEXT, linewidth=1.4)
    for place, dot in enumerate(dots):
        spread = 0.0 if len(dots) == 1 else 0.22 * ((place * 0.618034) % 1 - 0.5) * 2
        score = _moved(dot.score, low, high)
        _dot(axes, score, row + spread, dot, score != dot.score)


def effect_of_number(metric: str, dots: Sequence[Dot], label: str) -> Markup:
    """Scores over the values of a key; a line joins the medians of values that come again."""
    dots = [dot for dot in dots if dot.value is not None]
    low, high = _range(dots)
    figure, axes = drawing(right=20, left=52)
    keys = axis_of_numbers("", [float(dot.value) for dot in dots])  # type: ignore[arg-type]
    scale(axes, "y", [low, high], percent=_is_share(metric))
    columns: dict[float, list[float]] = {}
    for place, dot in zip(keys.places, dots, strict=True):
        if dot.is_done:
            columns.setdefault(place, []).append(_moved(dot.score, low, high))
    if len(columns) > 1 and sum(map(len, columns.values())) >= 1.5 * len(columns):
        line = sorted((place, statistics.median(scores)) for place, scores in columns.items())
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1, alpha=0.7)
    for place, dot in zip(keys.places, dots, strict=True):
        score = _moved(dot.score, low, high)
        _dot(axes, place, score, dot, score != dot.score)
    ticks = sorted(_apart(keys.ticks, 0.12))
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


def _moved(score: float, low: float, high: float) -> float:
    return min(max(score, low), high)


def _range(dots: Sequence[Dot]) -> tuple[float, float]:
    """The scores that are drawn where they are, the others being moved to the edge.

    One run that learned nothing, or was given up after an epoch, would hide what differs. The
    fences are Tukey's outer ones, "Exploratory Data Analysis", 1977.
    """
    scores = [dot.score for dot in dots]
    done = [dot.score for dot in dots if dot.is_done]
    if len(done) < MIN_FOR_RANGE:
        return min(scores), max(scores)
    first, _, third = statistics.quantiles(done, n=4, method="inclusive")
    reach = 3 * (third - first) or math.inf
    winner = [dot.score for dot in dots if dot.is_winner]
    low = min(max(min(scores), first - reach), *winner, third)
    return low, max(min(max(scores), third + reach), *winner, first)


def _is_share(metric: str) -> bool:
    return "accuracy" in metric


# --- parallel coordinates ------------------------------------------------------------------------


class Axis(NamedTuple):
    """One of several parallel axes.

    Attributes:
        places: of each configuration, in 0..1 from the bottom.
        ticks: places and what stands there.
    """

    name: str
    places: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def axis_of_key(name: str, values: Sequence[Value]) -> Axis:
    """The axis of a key: a scale for numbers, else a place for each choice.

    The lines of a choice fan out, in the order of the configurations, so that none hides another.
    """
    if are_numbers(values) and None not in values and len(set(values)) > 1:
        return axis_of_numbers(name, [float(value) for value in values])  # type: ignore[arg-type]
    listed = choices(values)
    step = 1 / max(1, len(listed) - 1)
    places = {text: row * step if len(listed) > 1 else 0.5 for row, text in enumerate(listed)}
    fan, last = 0.3 * min(step, 0.5), max(1, len(values) - 1)
    fanned = [places[leaderboard.cell(v)] + fan * (0.5 - i / last) for i, v in enumerate(values)]
    return Axis(name, fanned, [(place, short(text)) for text, place in places.items()])


def axis_of_numbers(
    name: str, values: Sequence[float], told: Callable[[float], str] = digits
) -> Axis:
    """The axis of numbers; its ticks are the values themselves where these are few."""
    low, high = min(values), max(values)
    is_log = is_wide(values) or _is_geometric(values)
    move = math.log if is_log else float

    def place(value: float) -> float:
        return (move(value) - move(low)) / (move(high) - move(low)) if high > low else 0.5

    distinct = sorted(set(values))
    if len(distinct) > 6:
        locator = LogLocator(numticks=6) if is_log else MaxNLocator(5)
        found = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        distinct = found if len(found) > 1 else [low, high]
    return Axis(name, [place(v) for v in values], [(place(v), told(v)) for v in distinct])


def axis_of_scores(metric: str, scores: Sequence[float]) -> Axis:
    """The axis of what came of it, the winner's score first; its ends say what was moved there."""
    low, high = _range([Dot(None, score, True, row == 0) for row, score in enumerate(scores)])
    kept = [score for score in scores if low <= score <= high]
    room = (max(kept) - min(kept)) / 8
    below = [score for score in scores if score < low]
    above = [score for score in scores if score > high]
    low = min(kept) - room if below else low
    high = max(kept) + room if above else high

    def told(score: float) -> str:
        return leaderboard.number(metric, score)

    axis = axis_of_numbers(metric, [_moved(score, low, high) for score in scores], told)
    ends = [(0.0, f"≤ {told(max(below))}")] if below else []
    ends += [(1.0, f"≥ {told(min(above))}")] if above else []
    return axis._replace(ticks=[*ends, *axis.ticks])


def parallel(axes: Sequence[Axis], has_winner: bool, label: str) -> Markup:
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
        is_winner = has_winner and row == 0
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
        for place, text in _apart(axis.ticks, 0.05):
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


def _is_geometric(values: Sequence[float]) -> bool:
    """Whether these are few and each is about twice the one before, or more: 32, 64, 128."""
    distinct = sorted(set(values))
    pairs = list(itertools.pairwise(distinct))
    return 2 <= len(pairs) <= 12 and distinct[0] > 0 and all(b >= 1.9 * a for a, b in pairs)


def _apart(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Those of `ticks` that are farther than `gap` from each other, the outermost first."""
    kept: list[tuple[float, str]] = []
    for tick in sorted(ticks, key=lambda tick: -abs(tick[0] - 0.5)):
        if all(abs(tick[0] - other[0]) > gap for other in kept):
            kept.append(tick)
    return kept


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
        thin = thinned(Line("", ink, line.x, line.y), limit=limit)
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
        Line(line.name, SECOND if line.is_winner else FIRST, line.x, line.y)
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
    low, high = _range(trials)
    scale(axes, "y", [low, high], percent=_is_share(metric))
    best: list[tuple[float, float]] = []
    for dot in trials:
        number, score = float(dot.value), _moved(dot.score, low, high)  # type: ignore[arg-type]
        _dot(axes, number, score, dot, score != dot.score)
        if dot.is_done:
            is_better = not best or (score > best[-1][1]) == is_higher_better
            best.append((number, score if is_better else best[-1][1]))
    best.append((max(num_trials - 1, best[-1][0]), best[-1][1]))
    line = Line("best", SECOND, *zip(*best, strict=True))
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
