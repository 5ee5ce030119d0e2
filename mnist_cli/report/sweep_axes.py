"""The axes of a sweep's drawings: where its values stand, and what is written there."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

from mnist_cli import formats
from mnist_cli.errors import one_line
from mnist_cli.report.canvas import is_wide
from mnist_cli.report.sweep_record import Value
from mnist_cli.run import LARGEST_METRIC
from mnist_cli.sweep import display

MIN_FOR_RANGE = 5  # completed configurations that set the range of an axis


class Dot(NamedTuple):
    """A configuration: the value of a key, and what came of it.

    Attributes:
        is_done: False for one that was given up or cut off; `score` is its best until then.
    """

    value: Value
    score: float
    is_done: bool
    is_winner: bool


class Axis(NamedTuple):
    """One of several parallel axes.

    Attributes:
        places: of each configuration, in 0..1 from the bottom.
        ticks: places and what stands there.
    """

    name: str
    places: Sequence[float]
    ticks: Sequence[tuple[float, str]]


def _is_number(value: Value) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) <= LARGEST_METRIC  # type: ignore[arg-type]


def are_numbers(values: Sequence[Value]) -> bool:
    """Whether a key has a scale: its values are numbers, but for where it doesn't apply."""
    given = [value for value in values if value is not None]
    return bool(given) and all(map(_is_number, given))


def choices(values: Sequence[Value]) -> list[str]:
    """The distinct values as texts, in the order in which people count: 8, 16, 128."""
    return sorted(set(map(display.cell, values)), key=_natural)


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
    fanned = [places[display.cell(v)] + fan * (0.5 - i / last) for i, v in enumerate(values)]
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
    low, high = range_of([Dot(None, score, True, row == 0) for row, score in enumerate(scores)])
    kept = [score for score in scores if low <= score <= high]
    room = (max(kept) - min(kept)) / 8
    below = [score for score in scores if score < low]
    above = [score for score in scores if score > high]
    low = min(kept) - room if below else low
    high = max(kept) + room if above else high

    def told(score: float) -> str:
        return formats.metric(metric, score)

    axis = axis_of_numbers(metric, [moved(score, low, high) for score in scores], told)
    ends = [(0.0, f"≤ {told(max(below))}")] if below else []
    ends += [(1.0, f"≥ {told(min(above))}")] if above else []
    return axis._replace(ticks=[*ends, *axis.ticks])


def _is_geometric(values: Sequence[float]) -> bool:
    """Whether these are few and each is about twice the one before, or more: 32, 64, 128."""
    distinct = sorted(set(values))
    pairs = list(itertools.pairwise(distinct))
    return 2 <= len(pairs) <= 12 and distinct[0] > 0 and all(b >= 1.9 * a for a, b in pairs)


def apart(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Those of `ticks` that are farther than `gap` from each other, the outermost first."""
    kept: list[tuple[float, str]] = []
    for tick in sorted(ticks, key=lambda tick: -abs(tick[0] - 0.5)):
        if all(abs(tick[0] - other[0]) > gap for other in kept):
            kept.append(tick)
    return kept


def moved(score: float, low: float, high: float) -> float:
    """Where a score is drawn, `low` and `high` being as of `range_of`."""
    return min(max(score, low), high)


def range_of(dots: Sequence[Dot]) -> tuple[float, float]:
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
