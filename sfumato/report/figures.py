"""The report's figures: curves over training, and reward against diversity, as inline SVG."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito's colours that can be told apart on white, with and without colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SYMBOLS = ("●", "■", "▲", "◆", "▼", "✚", "✖")  # the same, as characters
INK, GREY = "#222222", "#6b6b6b"
LABEL_ROOM = 0.3  # of the width of the data
LABEL_GAP = 13.0  # points between the labels of two lines
PALE = 0.4  # opacity

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Line:
    """One run's points.

    Attributes:
        style: which color and marker; the same in every figure.
        error: half the height of the bars at each point.
        name: written at the line's end, where there is room for it.
        ring: a point of it that stands out.
        pale: drawn behind the run's other line.
    """

    style: int
    x: Sequence[int | float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    markers: bool = True
    name: str = ""
    ring: tuple[int | float, float] | None = None
    pale: bool = False

    @property
    def color(self) -> str:
        return COLORS[self.style % len(COLORS)]

    @property
    def marker(self) -> str:
        return MARKERS[self.style % len(MARKERS)]


@dataclass(frozen=True)
class Panel:
    """One quantity over training steps, or over t; `base` is the base model's own value."""

    title: str
    lines: Sequence[Line]
    base: float | None = None
    over_t: bool = False  # with a logarithmic axis, as errors at different t differ in size


def draw_panel(panel: Panel) -> str:
    """Return the SVG of one quantity."""
    with rc_context({**STYLE, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for line in panel.lines:
            _draw(axes, line)
        if panel.base is not None:
            axes.axhline(panel.base, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.set_title(panel.title, color=INK)
        if panel.over_t:
            axes.set_xlabel("t (0: image, 1: noise)")
            axes.set_xlim(0, 1)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        return _svg(figure)


def draw_tradeoff(
    lines: Sequence[Line], base: tuple[float, float] | None, reward: str, diversity: str
) -> str:
    """Return the SVG of reward against diversity: a line per run through its evaluated steps.

    Args:
        lines: x is reward, y diversity, in the order of steps.
        base: reward and diversity of the base model.
        reward: label of the x axis.
        diversity: label of the y axis.
    """
    with rc_context({**STYLE, "svg.hashsalt": "tradeoff"}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        ends = [(line.x[-1], line.y[-1], line.name) for line in lines]
        if base is not None:
            axes.plot(*base, marker="o", markersize=9, color=INK, linestyle="none", zorder=5)
            ends.append((*base, "base model"))
        axes.set_xlabel(reward)
        axes.set_ylabel(diversity)
        # Names stand to the right of the lines' ends, and are placed by the final limits.
        axes.margins(x=0.05, y=0.1)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + LABEL_ROOM * (right - left))
        figure.draw_without_rendering()
        _label(axes, ends, figure.dpi)
        return _svg(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window` - 1 before it, or as many as there are."""
    means = []
    for i in range(len(values)):
        seen = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(seen) / len(seen))
    return means


def _draw(axes: Axes, line: Line) -> None:
    # A round behind every six runs gets a dash of its own.
    dash = ("-", "--", ":", "-.")[line.style // len(COLORS) % 4]
    marker = line.marker if line.markers or len(line.x) == 1 else "none"
    alpha = PALE if line.pale else None
    axes.plot(line.x, line.y, color=line.color, marker=marker, linestyle=dash, alpha=alpha)
    if line.error is not None:
        axes.errorbar(
            line.x, line.y, line.error, fmt="none", ecolor=line.color, elinewidth=1, alpha=alpha
        )
    if line.ring is not None:
        axes.plot(
            *line.ring,
            marker="o",
            markersize=12,
            fillstyle="none",
            color=line.color,
            linestyle="none",
        )


def _label(axes: Axes, ends: Sequence[tuple[float, float, str]], dpi: float) -> None:
    """Write each name to the right of its point, moved up where it would meet another."""
    taken = float("-inf")
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1] * 72 / dpi
        shift = max(0.0, taken + LABEL_GAP - height)
        taken = height + shift
        axes.annotate(
            name, (x, y), (9, shift), textcoords="offset points", va="center", color=INK, zorder=6
        )


def _svg(figure: Figure) -> str:
    """Return the figure as one <svg> element that needs nothing from outside."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    head = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # alike in every figure, referred to by none
    return f"{head}>{body}"
