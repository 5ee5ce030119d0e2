"""Drawings as SVG that stands inside a page and takes its colours and font from it.

matplotlib draws in stand-in colours, one for each ink; in the text of the SVG each of them becomes
a CSS variable of the page. So one drawing serves light, dark and paper. Words out of a file have
stand-ins too: matplotlib never sees them, and they are escaped where they are put in.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 340, 220  # of a drawing, in pixels at its natural size
MAX_POINTS = 800  # of a line or a cloud; more than there are pixels
LOG_FROM = 30  # a range of values as wide as this is drawn on a logarithmic axis
LEAST_FOR_LOG = 1e-100  # an axis of smaller numbers would begin at 0, margin included

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


class Curve(NamedTuple):
    """A curve with the name at its end, which is one of this program's words."""

    name: str
    ink: str
    x: Sequence[float]
    y: Sequence[float]


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """The style of drawings, in place of the user's, while a page is rendered."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def drawing(
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    left: int = 46,
    right: int,
    top: int = 22,
    bottom: int = 34,
) -> tuple[Figure, Axes]:
    """An empty drawing with its margins in pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    size = ((width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *size))


def is_wide(values: Sequence[float]) -> bool:
    """Whether these are drawn on a logarithmic axis."""
    return min(values) > LEAST_FOR_LOG and max(values) / min(values) >= LOG_FROM


def scale(
    axes: Axes, which: Literal["x", "y"], values: Sequence[float], *, percent: bool = False
) -> None:
    """Give an axis a linear or logarithmic scale, as the values ask for, and a few ticks.

    Args:
        percent: the values are fractions.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    if is_wide(values) and not percent:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.0e}" if value < 0.01 else f"{value:g}")
        )
    else:
        axis.set_major_locator(MaxNLocator(5))
        if percent:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def thinned(line: Curve, mark: float | None = None, limit: int = MAX_POINTS) -> Curve:
    """`line` with about `limit` points at most, its last one and the one at `mark` among them."""
    step = math.ceil(len(line.x) / limit)
    last = len(line.x) - 1
    kept = [i for i, x in enumerate(line.x) if i % step == 0 or i == last or x == mark]
    return line._replace(x=[line.x[i] for i in kept], y=[line.y[i] for i in kept])


def few_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def name_x(axes: Axes, name: str) -> None:
    axes.annotate(
        name, (1, 0), xycoords="axes fraction", xytext=(0, -19), textcoords="offset points",
        ha="right", va="top", color=MUTED, fontsize=9,
    )  # fmt: skip


def name_ends(axes: Axes, lines: Sequence[Curve]) -> None:
    """Write the name of each line where it ends, a line's height apart at least."""
    axes.autoscale_view()
    ends = [(axes.transData.transform((line.x[-1], line.y[-1])), line) for line in lines]
    last = -math.inf
    for (x, y), line in sorted(ends, key=lambda end: end[0][1]):
        last = max(y, last + 12)
        left, middle = axes.figure.transFigure.inverted().transform((x + 7, last))
        axes.figure.text(left, middle, line.name, color=line.ink, va="center")


def word(number: int) -> str:
    """What stands in a drawing for a word out of a file, until `svg` puts the word in."""
    return f"@{number}@"


def svg(figure: Figure, label: str, words: Sequence[str] = ()) -> Markup:
    """The drawing as an element of a page.

    Args:
        label: what a reader who can't see it is told. It is escaped.
        words: what `word(0)` and those after it stand for. They are escaped.
    """
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
    prefix = f"d{zlib.crc32(inner.encode()):x}-"  # two drawings of a page may have the same ids
    inner = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", inner)
    inner = re.sub(r"@(\d+)@", lambda found: escape(words[int(found[1])]), inner)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    head = Markup('<svg role="img" aria-label="{}" width="{}" viewBox="0 0 {} {}">')
    return head.format(label, width, width, height) + Markup(inner) + Markup("</svg>")
