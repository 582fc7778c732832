"""The report: one HTML file that needs nothing else, a pure function of run folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import sfumato
from sfumato.evaluation.comparison import compare, from_base, steps_at_equal_reward
from sfumato.evaluation.curves import (
    COLORS,
    SYMBOLS,
    Line,
    Panel,
    draw_panel,
    draw_tradeoff,
    running_mean,
)
from sfumato.evaluation.pictures import Grid, image_grids, validation_grid
from sfumato.evaluation.records import RunRecord, read_runs
from sfumato.evaluation.results import Evaluation
from sfumato.evaluation.tables import (
    Table,
    difference_table,
    equal_reward_table,
    held_out_names,
    origin_table,
    summary_table,
)
from sfumato.evaluation.words import gaps, method, outcome
from sfumato.training.folder import RunFolder

TEMPLATE = Path(__file__).with_name("report.html")
ABOUT_TRAINING = (
    "Training rewards are those of the batches, with other prompts and noise at every step. KL is "
    "measured where kl_coeff is not 0."
)
ABOUT_PANELS = (
    "Evaluated quantities have a mark at each evaluated step, and rewards bars of one standard "
    "error. " + ABOUT_TRAINING
)
SMOOTH_ABOVE = 200  # logged steps; beyond it training curves show running means


@dataclass(frozen=True)
class Key:
    """How a run is drawn in every figure."""

    name: str
    color: str
    symbol: str


@dataclass(frozen=True)
class Page:
    """What the template shows, from top to bottom."""

    title: str
    notes: Sequence[str]
    sentences: Sequence[str]
    gaps: Sequence[str]
    summary: Table
    how: str
    keys: Sequence[Key]
    has_base: bool
    panels: Sequence[Markup]
    about_panels: str
    tradeoff: Markup | None
    comparisons: Sequence[Table]
    equal_grids: Sequence[Grid]
    last_grids: Sequence[Grid]
    pairs: Sequence[Grid]
    origins: Table
    differences: Table | None
    configs: Sequence[tuple[str, str]]
    version: str


def write_report(runs: Sequence[RunFolder], out: Path, *, title: str, notes: str = "") -> Path:
    """Write a self-contained HTML page that compares runs with each other and the base model.

    Args:
        runs: with what they hold: config.yaml at least; what else is missing is said on the page.
        out: the file to write.
        notes: plain text for the head of the page; an empty line separates paragraphs.

    Returns:
        `out`.

    Raises:
        ValueError: if a folder cannot be read, or two runs were evaluated differently.
    """
    page = _page(read_runs(runs), title, notes)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    text = environment.get_template(TEMPLATE.name).render(page=page)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(out)
    return out


def _breakable(name: str) -> Markup:
    """Let a run's name break after an underscore, where its column is narrow."""
    return Markup("_<wbr>").join(name.split("_"))


def _page(records: Sequence[RunRecord], title: str, notes: str) -> Page:
    base_run = next((record for record in records if record.base is not None), None)
    base = base_run.base if base_run else None
    compared = compare(records, base)
    untuned = [("base model", base_run, 0)] if base_run else []
    equal = [
        (record.name, record, step)
        for record, step in zip(records, steps_at_equal_reward(records, base), strict=False)
    ]
    last = [(record.name, record, record.final.step) for record in records if record.final]
    return Page(
        title=title,
        notes=[part.strip() for part in notes.split("\n\n") if part.strip()],
        sentences=outcome(records, base, compared),
        gaps=gaps(records, base),
        summary=summary_table(records, base),
        how=method(records),
        keys=[
            Key(r.name, COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)])
            for i, r in enumerate(records)
        ],
        has_base=base is not None,
        about_panels=ABOUT_PANELS if base is not None else ABOUT_TRAINING,
        panels=[Markup(draw_panel(panel)) for panel in _panels(records, base)],
        tradeoff=_tradeoff(records, base),
        comparisons=[
            equal_reward_table(one.baseline, one.other, one.result)
            for one in compared
            if one.result is not None
        ],
        equal_grids=image_grids([*untuned, *equal]) if equal and equal != last else [],
        last_grids=image_grids([*untuned, *last]),
        pairs=[
            grid
            for record in records
            if not record.evaluations and (grid := validation_grid(record)) is not None
        ],
        origins=origin_table(records),
        differences=difference_table(records),
        configs=[(r.name, r.folder.config.read_text(encoding="utf-8")) for r in records],
        version=sfumato.__version__,
    )


def _panels(records: Sequence[RunRecord], base: Evaluation | None) -> list[Panel]:
    """Return what is drawn over training steps: what was evaluated, then what training logged."""
    panels = []
    curves = [from_base(record, base) for record in records]
    if any(curves):
        label = next(curve[0].diversity_label for curve in curves if curve)
        panels.append(_evaluated("reward", curves, lambda one: one.reward, base))
        for name in held_out_names(records):
            panels.append(_evaluated(name, curves, lambda one, n=name: one.held_out.get(n), base))
        panels.append(_evaluated(label, curves, lambda one: one.diversity, base))
    else:
        panels += _logged("validation/reward", "reward of validation images", records)
    panels += _logged("reward", "reward in training", records)
    panels += _logged("kl", "KL in training", records)
    return panels


def _evaluated(
    title: str,
    curves: Sequence[Sequence[Evaluation]],
    value: Callable[[Evaluation], float | None],
    base: Evaluation | None,
) -> Panel:
    lines = []
    for i, curve in enumerate(curves):
        points = [(one.step, y, one) for one in curve if (y := value(one)) is not None]
        error = [one.reward_error for _, _, one in points] if title == "reward" else None
        lines.append(Line(i, [x for x, _, _ in points], [y for _, y, _ in points], error))
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


def _tradeoff(records: Sequence[RunRecord], base: Evaluation | None) -> Markup | None:
    lines = []
    for i, record in enumerate(records):
        if record.final is not None:
            curve = from_base(record, base)
            points = [one.reward for one in curve], [one.diversity for one in curve]
            lines.append(Line(i, *points, name=record.name))
    if not lines:
        return None
    label = next(r.final.diversity_label for r in records if r.final is not None)
    point = (base.reward, base.diversity) if base is not None else None
    return Markup(draw_tradeoff(lines, point, "reward", label))
