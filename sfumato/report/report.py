"""The report: one HTML file that needs nothing else, a pure function of run folders."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import sfumato
from sfumato.report.comparison import compare, steps_at_equal_reward
from sfumato.report.figures import COLORS, SYMBOLS, draw_panel
from sfumato.report.losses import validation_loss
from sfumato.report.panels import tradeoff, training_panels
from sfumato.report.pictures import Grid, before_and_after, image_grids, validation_grid
from sfumato.report.records import RunRecord, read_runs
from sfumato.report.sentences import about_panels, gaps, method, outcome
from sfumato.report.tables import (
    Table,
    difference_table,
    equal_reward_table,
    origin_table,
    summary_table,
)
from sfumato.training.folder import RunFolder

TEMPLATE = Path(__file__).with_name("report.html")


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
    courses: Sequence[Grid]
    equal_grids: Sequence[Grid]
    last_grids: Sequence[Grid]
    has_rewards: bool
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
    base_run = _base_run(records)
    base = base_run.base if base_run else None
    compared = compare(records, base)
    untuned = [("base model", base_run, 0)] if base_run else []
    steps = steps_at_equal_reward(records, base)
    equal = [(record.name, record, step) for record, step in steps]
    finals = [record.final for record in records if record.final]
    last = [(record.name, record, record.final.step) for record in records if record.final]
    elsewhere = any(record.final and record.final.step != step for record, step in steps)
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
        about_panels=about_panels(records, base),
        panels=[Markup(draw_panel(panel)) for panel in training_panels(records, base)],
        tradeoff=Markup(drawn) if (drawn := tradeoff(records, base)) else None,
        comparisons=[
            equal_reward_table(one.baseline, one.other, one.result)
            for one in compared
            if one.result is not None
        ],
        courses=_grids(_course(record) for record in records if record.supervised),
        equal_grids=image_grids([*untuned, *equal]) if elsewhere else [],
        last_grids=image_grids([*untuned, *last]),
        has_rewards=any(one.reward is not None for one in finals),
        pairs=_grids(
            validation_grid(record)
            for record in records
            if not record.supervised and not record.evaluations
        ),
        origins=origin_table(records),
        differences=difference_table(records),
        configs=[(r.name, r.folder.config.read_text(encoding="utf-8")) for r in records],
        version=sfumato.__version__,
    )


def _base_run(records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the run whose evaluation of the base model is shown: if there is one, with rewards."""
    runs = [record for record in records if record.base is not None]
    scored = [run for run in runs if run.base is not None and run.base.reward is not None]
    return next(iter(scored or runs), None)


def _course(record: RunRecord) -> Grid | None:
    loss = validation_loss(record)
    return before_and_after(record, loss.lowest.step if loss and loss.lowest else None)


def _grids(found: Iterable[Grid | None]) -> list[Grid]:
    return [grid for grid in found if grid is not None]
