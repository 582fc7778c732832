"""What the report draws: curves over training, losses by t, reward against diversity."""

from collections.abc import Callable, Sequence

from sfumato.evaluation.results import Evaluation
from sfumato.report.comparison import from_base
from sfumato.report.figures import Line, Panel, draw_tradeoff, running_mean
from sfumato.report.losses import loss_by_t, validation_loss
from sfumato.report.records import RunRecord
from sfumato.report.tables import held_out_names

SMOOTH_ABOVE = 200  # logged steps; beyond it training curves show running means
LOSS_WINDOWS = 20  # of the running mean, in the longest run: losses are noisier than rewards


def training_panels(records: Sequence[RunRecord], base: Evaluation | None) -> list[Panel]:
    """Return what is drawn: validation losses, what was evaluated, then what training logged."""
    panels = _validation_losses(records)
    curves = [from_base(record, base) if record.evaluations else [] for record in records]
    if any(one.reward is not None for curve in curves for one in curve):
        scored = [
            curve if record.scored else [] for record, curve in zip(records, curves, strict=True)
        ]
        panels.append(_evaluated("reward", scored, lambda one: one.reward, base))
    else:
        panels += _logged("validation/reward", "reward of validation images", records)
    if any(curves):
        label = next(curve[0].diversity_label for curve in curves if curve)
        for name in held_out_names(records):
            panels.append(_evaluated(name, curves, lambda one, n=name: one.held_out.get(n), base))
        panels.append(_evaluated(label, curves, lambda one: one.diversity, base))
    panels += _logged("reward", "reward in training", records)
    panels += _logged("kl", "KL in training", records)
    return panels + _training_losses(records) + _losses_by_t(records)


def _validation_losses(records: Sequence[RunRecord]) -> list[Panel]:
    lines = []
    for i, record in enumerate(records):
        loss = validation_loss(record)
        if loss is not None:
            lowest = loss.lowest
            ring = (lowest.step, lowest.value) if lowest else None
            lines.append(Line(i, *record.series("validation/loss"), ring=ring))
    return [Panel("validation loss", lines)] if lines else []


def _training_losses(records: Sequence[RunRecord]) -> list[Panel]:
    """Return the running mean of the loss, from where as many steps as it has are behind it."""
    series = [record.series("loss") if record.supervised else ([], []) for record in records]
    window = max(1, max(len(values) for _, values in series) // LOSS_WINDOWS)
    lines = []
    for i, (steps, values) in enumerate(series):
        if steps:
            first = min(window, len(values)) - 1
            means = running_mean(values, window)
            lines.append(Line(i, steps[first:], means[first:], markers=False))
    title = "loss in training" + (f" (running mean of {window})" if window > 1 else "")
    return [Panel(title, lines)] if lines else []


def _losses_by_t(records: Sequence[RunRecord]) -> list[Panel]:
    lines = []
    for i, record in enumerate(records):
        found = loss_by_t(record)
        if found is not None:
            ends = ((found.start, True), (found.end, False))
            lines += [Line(i, one.t, one.mean, one.error, pale=pale) for one, pale in ends]
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


def _logged(key: str, title: str, records: Sequence[RunRecord]) -> list[Panel]:
    """Return the panel of a logged metric, smoothed where it is long; none where nobody has it."""
    series = [record.series(key) for record in records]
    longest = max(len(values) for _, values in series)
    window = longest // 100 if longest > SMOOTH_ABOVE else 1
    if window > 1:
        title = f"{title} (running mean of {window})"
    lines = [
        Line(i, steps, running_mean(values, window), markers=False)
        for i, (steps, values) in enumerate(series)
        if steps
    ]
    return [Panel(title, lines)] if lines else []


def tradeoff(records: Sequence[RunRecord], base: Evaluation | None) -> str | None:
    """Return the figure of reward against diversity, or None where nothing has both."""
    lines = []
    for i, record in enumerate(records):
        if record.final is not None and record.final.reward is not None:
            curve = [(one.reward, one.diversity) for one in from_base(record, base)]
            points = [(reward, diversity) for reward, diversity in curve if reward is not None]
            rewards, diversities = zip(*points, strict=True)
            lines.append(Line(i, rewards, diversities, name=record.name))
    if not lines:
        return None
    label = next(r.final.diversity_label for r in records if r.final is not None)
    point = None
    if base is not None and base.reward is not None:
        point = (base.reward, base.diversity)
    return draw_tradeoff(lines, point, "reward", label)
