"""Figures of the report as inline SVG: training curves, loss by t, reward against diversity."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sfumato.evaluation.results import Evaluation
from sfumato.report.comparison import from_base, variant_curves
from sfumato.report.differences import DIVERSITY, HELD_OUT, REWARD, means
from sfumato.report.losses import loss_by_t, validation_loss
from sfumato.report.records import RunRecord
from sfumato.report.tables import VALIDATED, held_out_names, validated_names

# Okabe and Ito's palette, which readers with any colour vision can distinguish on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SYMBOLS = ("●", "■", "▲", "◆", "▼", "✚", "✖")  # the markers as characters
INK, GREY = "#222222", "#6b6b6b"
LABEL_ROOM = 0.3  # of the width of the data
LABEL_GAP = 13.0  # points between the labels of two lines
PALE = 0.4  # opacity
LIMIT = "#b3261e"
MOST_MARKS, MOST_POINTS = 120, 400  # of a line; longer ones are thinned
# Windows of the running mean in the longest run: losses are noisier than rewards.
REWARD_WINDOWS, LOSS_WINDOWS = 100, 20
SMOOTH_ABOVE = 200  # logged steps; shorter curves of rewards are not smoothed

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


T = TypeVar("T")
Series: TypeAlias = tuple[Sequence[int | float], Sequence[int | float]]  # steps and values


@dataclass(frozen=True)
class Line:
    """One run's points.

    Attributes:
        style: number of the color and marker, the same in every figure.
        error: half the height of the bar at each point.
        name: a label at the end of the line.
        rings: points to highlight.
        pale: whether to draw the line half transparent.
    """

    style: int
    x: Sequence[int | float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    markers: bool = True
    name: str = ""
    rings: Sequence[tuple[int | float, float]] = ()
    pale: bool = False


@dataclass(frozen=True)
class Panel:
    """One quantity over training steps or over t.

    Attributes:
        base: the value of the base model.
        limits: of guards.
    """

    title: str
    lines: Sequence[Line]
    base: float | None = None
    over_t: bool = False  # the y axis is then logarithmic
    limits: Sequence[float] = ()


def training_panels(records: Sequence[RunRecord], base: Evaluation | None) -> list[Panel]:
    """Return validation losses, then evaluated measures, then metrics that training logged."""

    def rewards(title: str, key: str) -> list[Panel]:
        series = [record.series(key) for record in records]
        return _logged(title, series, windows=REWARD_WINDOWS, above=SMOOTH_ABOVE)

    panels = _validation_losses(records)
    curves = [from_base(record, base) if record.evaluations else [] for record in records]
    if any(one.reward is not None for curve in curves for one in curve):
        scored = [
            curve if record.scored else [] for record, curve in zip(records, curves, strict=True)
        ]
        panels.append(_evaluated("reward", scored, lambda one: one.reward, base))
    else:
        panels += rewards("reward of validation images", "validation/reward")
    for name in validated_names(records):
        panels += rewards(f"{name} of validation images (held out)", f"{VALIDATED}{name}")
    if any(curves):
        label = next(curve[0].diversity_label for curve in curves if curve)
        for name in held_out_names(records):
            panels.append(
                _evaluated(
                    f"{name} (held out)", curves, lambda one, n=name: one.held_out.get(n), base
                )
            )
        panels.append(_evaluated(label, curves, lambda one: one.diversity, base))
    panels += rewards("reward in training", "reward")
    panels += rewards("KL in training", "kl")
    losses = [record.series("loss") if record.supervised else ([], []) for record in records]
    panels += _logged("loss in training", losses, windows=LOSS_WINDOWS, full=True)
    return panels + _losses_by_t(records)


def draw_panel(panel: Panel) -> str:
    """Return the SVG of one quantity."""
    with rc_context({**STYLE, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for line in panel.lines:
            _draw(axes, line)
        if panel.base is not None:
            axes.axhline(panel.base, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        for limit in panel.limits:
            axes.axhline(limit, color=LIMIT, linestyle=":", linewidth=1.4, zorder=1)
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
        return inline_svg(figure)


def draw_tradeoffs(records: Sequence[RunRecord], base: Evaluation | None) -> list[tuple[str, str]]:
    """Return names and SVGs of diversity and held-out scores against the reward, a line per run."""
    label = next((r.evaluations[0].diversity_label for r in records if r.evaluations), DIVERSITY)
    kinds = [(DIVERSITY, "reward against diversity", label)]
    for name in held_out_names(records):
        kinds.append((f"{HELD_OUT}{name}", f"reward against {name}", f"{name} (held out)"))
    found = []
    for score, title, axis in kinds:
        lines = []
        for i, record in enumerate(records):
            points = _against_reward(from_base(record, base), score)
            if points and record.final is not None and record.final.reward is not None:
                rewards, others = zip(*points, strict=True)
                lines.append(Line(i, rewards, others, name=record.name))
        if lines:
            start = _against_reward([base] if base else [], score)
            found.append((title, _draw_plane(lines, start, axis, title)))
    return found


def _against_reward(curve: Sequence[Evaluation], score: str) -> list[tuple[float, float]]:
    """Return reward and another score where both are known."""
    scores = [means(one) for one in curve if one.reward is not None]
    return [(each[REWARD], each[score]) for each in scores if score in each]


def draw_variants(record: RunRecord, base: Evaluation | None) -> str | None:
    """Return the SVG of a run's variants in reward against diversity, or None without any."""
    curves = variant_curves(record, base)
    own = [one for one in from_base(record, base) if one.reward is not None]
    named = [(record.name, own), *curves] if own else curves
    if not curves:
        return None
    lines = [
        Line(i, [one.reward or 0.0 for one in curve], [one.diversity for one in curve], name=name)
        for i, (name, curve) in enumerate(named)
    ]
    start = _against_reward([base] if base else [], DIVERSITY)
    return _draw_plane(lines, start, curves[0][1][-1].diversity_label, f"variants {record.name}")


def _draw_plane(
    lines: Sequence[Line], base: Sequence[tuple[float, float]], label: str, salt: str
) -> str:
    """Return the SVG of lines against the reward; `base` holds the point of the base model."""
    with rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        ends = [(line.x[-1], line.y[-1], line.name) for line in lines]
        for point in base:
            axes.plot(*point, marker="o", markersize=9, color=INK, linestyle="none", zorder=5)
            ends.append((*point, "base model"))
        axes.set_xlabel("reward")
        axes.set_ylabel(label)
        # Labels need room on the right, and the final limits decide where they overlap.
        axes.margins(x=0.05, y=0.1)
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + LABEL_ROOM * (right - left))
        figure.draw_without_rendering()
        _label(axes, ends, figure.dpi)
        return inline_svg(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window` - 1 values before it, fewer at the start."""
    means = []
    for i in range(len(values)):
        seen = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(seen) / len(seen))
    return means


def _validation_losses(records: Sequence[RunRecord]) -> list[Panel]:
    lines = []
    for i, record in enumerate(records):
        loss = validation_loss(record)
        if loss is not None:
            rings = [(loss.lowest.step, loss.lowest.value)] if loss.lowest else []
            lines.append(Line(i, *record.series("validation/loss"), rings=rings))
    return [Panel("validation loss", lines)] if lines else []


def _losses_by_t(records: Sequence[RunRecord]) -> list[Panel]:
    lines = []
    for i, record in enumerate(records):
        loss = loss_by_t(record)
        if loss is not None:
            for one, pale in ((loss.start, True), (loss.end, False)):
                lines.append(Line(i, one.t, one.mean, one.error, pale=pale))
    return [Panel("loss by t", lines, over_t=True)] if lines else []


def _evaluated(
    title: str,
    curves: Sequence[Sequence[Evaluation]],
    value: Callable[[Evaluation], float | None],
    base: Evaluation | None,
) -> Panel:
    lines = []
    for i, curve in enumerate(curves):
        points = [(one.step, y, one) for one in curve if (y := value(one)) is not None]
        errors = [one.reward_error for _, _, one in points if one.reward_error is not None]
        bars = errors if title == "reward" else None
        lines.append(Line(i, [x for x, _, _ in points], [y for _, y, _ in points], bars))
    return Panel(title, lines, value(base) if base else None)


def _logged(
    title: str, series: Sequence[Series], *, windows: int, above: int = 0, full: bool = False
) -> list[Panel]:
    """Return the panel of a logged metric, or [] if no run has it.

    Args:
        windows: how many windows of the running mean the longest run has.
        above: the number of steps up to which a curve is not smoothed.
        full: whether a curve starts where its first window is complete.
    """
    longest = max(len(values) for _, values in series)
    window = max(1, longest // windows) if longest > above else 1
    title += f" (running mean of {window})" if window > 1 else ""
    lines = []
    for i, (steps, values) in enumerate(series):
        first = min(window, len(values)) - 1 if full else 0
        if steps:
            means = running_mean(values, window)
            lines.append(Line(i, steps[first:], means[first:], markers=False))
    return [Panel(title, lines)] if lines else []


def _draw(axes: Axes, line: Line) -> None:
    # Each further round of six colors has another dash.
    dash = ("-", "--", ":", "-.")[line.style // len(COLORS) % 4]
    color, marker = COLORS[line.style % len(COLORS)], MARKERS[line.style % len(MARKERS)]
    marker = marker if line.markers or len(line.x) == 1 else "none"
    alpha = PALE if line.pale else None
    most = MOST_MARKS if line.markers else MOST_POINTS
    x, y = thinned(line.x, most), thinned(line.y, most)
    axes.plot(x, y, color=color, marker=marker, linestyle=dash, alpha=alpha)
    if line.error is not None:
        bars: Any = {"fmt": "none", "ecolor": color, "elinewidth": 1, "alpha": alpha}
        axes.errorbar(x, y, thinned(line.error, most), **bars)
    if line.rings:
        ring: Any = {"marker": "o", "markersize": 12, "fillstyle": "none", "linestyle": "none"}
        axes.plot(*zip(*thinned(line.rings, most), strict=True), color=color, **ring)


def thinned(points: Sequence[T], most: int) -> Sequence[T]:
    """Return at most so many points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _label(axes: Axes, ends: Sequence[tuple[float, float, str]], dpi: float) -> None:
    """Write each name to the right of its point, moved up where two would overlap."""
    taken = float("-inf")
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1] * 72 / dpi
        shift = max(0.0, taken + LABEL_GAP - height)
        taken = height + shift
        axes.annotate(
            name, (x, y), (9, shift), textcoords="offset points", va="center", color=INK, zorder=6
        )


def inline_svg(figure: Figure) -> str:
    """Return a figure as an element of a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    head = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", head)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # unused, and the same in every figure
    return f"{head}>{body}"
