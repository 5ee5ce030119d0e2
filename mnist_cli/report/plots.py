"""Drawings as SVG that stands inside a page and takes its colours and font from it.

matplotlib draws in stand-in colours, one for each ink; in the text of the SVG each of them becomes
a CSS variable of the page. So one drawing serves light, dark and paper. No text from a file is ever
drawn: class names and paths stand in the page, which escapes them.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mnist_cli.metrics import wilson

WIDTH, HEIGHT = 340, 220  # of a drawing, in pixels at its natural size
MAX_POINTS = 800  # of a line or a cloud; more than there are pixels
LOG_FROM = 30  # a range of values as wide as this is drawn on a logarithmic axis

# The stand-ins are near-blacks that nothing else has.
INKS = ("text", "muted", "grid", "first", "second", "paper")
STAND_INS = {ink: f"#00000{number}" for number, ink in enumerate(INKS, 1)}
TEXT, MUTED, GRID, FIRST, SECOND, PAPER = STAND_INS.values()

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mnist-cli",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": TEXT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache


class Line(NamedTuple):
    """A curve with the name at its end, which is one of this program's words."""

    name: str
    ink: str
    x: Sequence[float]
    y: Sequence[float]


def curves(
    lines: Sequence[Line], label: str, *, mark: float | None = None, percent: bool = False
) -> Markup:
    """Values over epochs, each line named at its end.

    Args:
        label: what a reader who can't see it is told.
        mark: the epoch to mark on the last line.
        percent: the values are fractions.
    """
    lines = [_thinned(line, mark) for line in lines if line.x]
    figure, axes = _drawing(right=74)
    values = [y for line in lines for y in line.y]
    if min(values) > 0 and max(values) / min(values) >= LOG_FROM and not percent:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda y, _: f"{y:.0e}" if y < 0.01 else f"{y:g}")
        )
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
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
    _name_ends(axes, lines)
    _name_x(axes, "epoch")
    return _svg(figure, label)


def rates(x: Sequence[float], y: Sequence[float], label: str) -> Markup:
    """The learning rate of each epoch's last step."""
    line = _thinned(Line("", FIRST, x, y), None)
    figure, axes = _drawing(right=16)
    axes.plot(line.x, line.y, color=MUTED, marker="o" if len(x) == 1 else None, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    axes.set_ylim(min(0, *line.y), 1.15 * max(*line.y, 1e-12))
    _name_x(axes, "epoch")
    return _svg(figure, label)


def reliability(bins: Sequence[dict[str, Any]], label: str) -> Markup:
    """How often answers of each confidence are right, over how many there are.

    Args:
        bins: of `metrics.calibration_bins`.
    """
    figure, axes = _drawing(height=340, bottom=106, left=46, right=16, top=26)
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
    _name_x(below, "probability of the answer")
    return _svg(figure, label)


def intervals(rows: Sequence[tuple[str, str, float, float, float]], label: str) -> Markup:
    """Shares with their intervals, one below the other: (name, ink, low, value, high) each."""
    figure, axes = _drawing(height=60 + 34 * len(rows), left=34, right=24, top=16)
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
    return _svg(figure, label)


def fit(x: Sequence[float], truth: Sequence[float], answers: Sequence[float], label: str) -> Markup:
    """Data of one feature as points and the model's answers as a line."""
    order = sorted(range(len(x)), key=x.__getitem__)
    picked = order[:: math.ceil(len(order) / MAX_POINTS)]
    figure, axes = _drawing(right=60)
    xs = [x[index] for index in picked]
    axes.plot(xs, [truth[index] for index in picked], "o", color=MUTED, markersize=2.6, alpha=0.6)
    line = Line("model", FIRST, xs, [answers[index] for index in picked])
    axes.plot(line.x, line.y, color=line.ink)
    _few_ticks(axes)
    _name_ends(axes, [line])
    _name_x(axes, "input")
    return _svg(figure, label)


def agreement(truth: Sequence[float], answers: Sequence[float], label: str) -> Markup:
    """Answers over truth, beside the line where both are equal."""
    step = math.ceil(len(truth) / MAX_POINTS)
    figure, axes = _drawing(right=16)
    ends = [min(*truth, *answers), max(*truth, *answers)]
    axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.plot(truth[::step], answers[::step], "o", color=FIRST, markersize=2.6, alpha=0.6)
    _few_ticks(axes)
    _name_x(axes, "truth")
    return _svg(figure, label)


def residuals(answers: Sequence[float], errors: Sequence[float], label: str) -> Markup:
    """Answer minus truth over the answer."""
    step = math.ceil(len(errors) / MAX_POINTS)
    figure, axes = _drawing(left=58, right=16)
    axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.plot(answers[::step], errors[::step], "o", color=SECOND, markersize=2.6, alpha=0.6)
    _few_ticks(axes)
    _name_x(axes, "answer")
    return _svg(figure, label)


def spread(errors: Sequence[float], label: str) -> Markup:
    """How many residuals there are of each size."""
    figure, axes = _drawing(right=16)
    axes.hist(errors, bins=min(31, 5 + len(errors) // 10), color=SECOND, alpha=0.8)
    _few_ticks(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _name_x(axes, "answer minus truth")
    return _svg(figure, label)


# --- on every drawing ----------------------------------------------------------------------------


def _drawing(
    *,
    height: int = HEIGHT,
    left: int = 46,
    right: int,
    top: int = 22,
    bottom: int = 34,
) -> tuple[Figure, Axes]:
    """An empty drawing with its margins in pixels. Drawings are made one after the other."""
    matplotlib.rcdefaults()  # a matplotlibrc of the user's would change the page
    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    size = ((WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    return figure, figure.add_axes((left / WIDTH, bottom / height, *size))


def _thinned(line: Line, mark: float | None) -> Line:
    """`line` with at most about MAX_POINTS, its last one and the one at `mark` among them."""
    step = math.ceil(len(line.x) / MAX_POINTS)
    last = len(line.x) - 1
    kept = [i for i, x in enumerate(line.x) if i % step == 0 or i == last or x == mark]
    return line._replace(x=[line.x[i] for i in kept], y=[line.y[i] for i in kept])


def _few_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _name_x(axes: Axes, name: str) -> None:
    axes.annotate(
        name, (1, 0), xycoords="axes fraction", xytext=(0, -19), textcoords="offset points",
        ha="right", va="top", color=MUTED, fontsize=9,
    )  # fmt: skip


def _name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write the name of each line where it ends, a line's height apart at least."""
    axes.autoscale_view()
    ends = [(axes.transData.transform((line.x[-1], line.y[-1])), line) for line in lines]
    last = -math.inf
    for (x, y), line in sorted(ends, key=lambda end: end[0][1]):
        last = max(y, last + 12)
        left, middle = axes.figure.transFigure.inverted().transform((x + 7, last))
        axes.figure.text(left, middle, line.name, color=line.ink, va="center")


def _svg(figure: Figure, label: str) -> Markup:
    """The drawing as an element of a page. `label` is escaped."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(text, metadata=nothing)  # type: ignore[no-untyped-call]
    drawn = text.getvalue()
    inner = drawn[drawn.index(">", drawn.index("<svg")) + 1 : drawn.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*">', "<g>", inner)  # the same in every drawing of a page
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"\s*\n\s*", " ", inner)
    for ink, stand_in in STAND_INS.items():
        inner = inner.replace(stand_in, f"var(--{ink})")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    head = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">')
    return head.format(label, width, height) + Markup(inner) + Markup("</svg>")
