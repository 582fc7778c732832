"""The report's tables of numbers, and how a number is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.evaluation.results import EqualReward, Evaluation
from sfumato.report.losses import validation_loss
from sfumato.report.records import RunRecord, differing

MINUS, PLUS_MINUS, NONE = "−", "±", "–"
HELD_OUT = "held-out score "  # keeps a score's column apart from others of the same name
LOSSES = ("images seen", "validation loss before", "lowest validation loss", "last validation loss")


@dataclass(frozen=True)
class Cell:
    """A value and, smaller, what belongs to it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def number(value: float, like: float | None = None, *, sign: bool = False) -> str:
    """Write a number with as many decimals as its size, or that of `like`, calls for."""
    if not math.isfinite(value):
        return NONE
    size = abs(value if like is None else like)
    decimals = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def loss_number(value: float) -> str:
    """Write a loss, whose last digits count."""
    return number(value, value / 100)


def change(before: float, after: float) -> str:
    """Write by which part a loss changed."""
    if not before:
        return NONE
    return f"{number(100 * (after - before) / before, 100.0, sign=True)}%"


def summary_table(records: Sequence[RunRecord], base: Evaluation | None) -> Table:
    """Return one row per model: what was trained, and what its last evaluation measured."""
    label = next((r.evaluations[0].diversity_label for r in records if r.evaluations), "diversity")
    losses = LOSSES if any(record.supervised for record in records) else ()
    rewards = ["reward"] if any(record.scored for record in records) else []
    evaluated = rewards or any(record.evaluations for record in records)
    held_out = [f"{HELD_OUT}{name}" for name in held_out_names(records)]
    scores = [*rewards, *held_out, label] if evaluated else []
    rows = []
    if base is not None:
        cells = {"model": Cell("base model"), "steps": Cell("0")}
        rows.append(cells | _scores(base, None, label))
    for record in records:
        final = record.final
        partly = final is not None and final.step != record.steps
        note = f"evaluated at {final.step}" if final is not None and partly else ""
        cells = {
            "model": Cell(record.name),
            "objective": Cell(record.objective),
            "steps": Cell(str(record.steps), note),
        }
        if final is not None:
            cells |= _scores(final, base, label)
        else:
            missing = scores if record.scored else [*held_out, label]
            cells |= {name: Cell("not evaluated") for name in missing}
        rows.append(cells | _losses(record))
    header = ["model", "objective", "steps", *losses, *scores]
    names = [name.removeprefix(HELD_OUT) for name in header]
    return Table("", names, [[row.get(name, Cell(NONE)) for name in header] for row in rows])


def equal_reward_table(baseline: str, other: str, result: EqualReward) -> Table:
    """Return the diversities of two runs, level by level."""
    rows = [
        [Cell(number(level)), Cell(number(a)), Cell(number(b)), Cell(number(b - a, a, sign=True))]
        for level, a, b in zip(
            result.levels, result.baseline_diversity, result.other_diversity, strict=True
        )
    ]
    difference = number(result.mean_difference, result.baseline_diversity[0], sign=True)
    rows.append([Cell("mean"), Cell(""), Cell(""), Cell(difference)])
    return Table(f"{other} against {baseline}", ["reward", baseline, other, "difference"], rows)


def origin_table(records: Sequence[RunRecord]) -> Table:
    """Return versions and hardware of each run's last start, and the scale of its reward."""
    last = [dict(record.starts[-1]) if record.starts else {} for record in records]
    keys = dict.fromkeys(key for start in last for key in start)
    rows = [[Cell("starts"), *(Cell(str(len(record.starts))) for record in records)]]
    for key in keys:
        values = [start.get(key) for start in last]
        shown = [NONE if value is None else str(value) for value in values]
        if key == "commit":
            shown = [value[:12] for value in shown]
        rows.append([Cell(key.replace("_", " ")), *(Cell(value) for value in shown)])
    return Table("", ["", *(record.name for record in records)], rows)


def difference_table(records: Sequence[RunRecord]) -> Table | None:
    """Return the settings in which the runs differ, or None where they do not."""
    rows = [
        [Cell(key), *(Cell("null" if value is None else str(value)) for value in values)]
        for key, values in differing(records).items()
    ]
    return Table("", ["", *(record.name for record in records)], rows) if rows else None


def held_out_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the held-out scores of all runs."""
    return list(dict.fromkeys(n for r in records for one in r.evaluations for n in one.held_out))


def _scores(one: Evaluation, base: Evaluation | None, label: str) -> dict[str, Cell]:
    """Return what was measured by column, each value with its distance from the base."""

    def against(value: float, own: float | None) -> str:
        return "" if own is None else number(value - own, value, sign=True)

    cells = {}
    if one.reward is not None and one.reward_error is not None:
        text = f"{number(one.reward)} {PLUS_MINUS} {number(one.reward_error, one.reward)}"
        cells["reward"] = Cell(text, against(one.reward, base and base.reward))
    for name, value in one.held_out.items():
        own = base.held_out.get(name) if base else None
        cells[f"{HELD_OUT}{name}"] = Cell(number(value), against(value, own))
    difference = against(one.diversity, base and base.diversity)
    return cells | {label: Cell(number(one.diversity), difference)}


def _losses(record: RunRecord) -> dict[str, Cell]:
    """Return what supervised training saw and reached, by column."""
    loss, seen = validation_loss(record), record.images_seen
    if not record.supervised:
        return {}
    cells = {"images seen": Cell(str(seen))} if seen is not None else {}
    if loss is None:
        return cells
    if loss.before is not None:
        cells["validation loss before"] = Cell(loss_number(loss.before.value))
    if loss.lowest is not None:
        at = f"step {loss.lowest.step}"
        cells["lowest validation loss"] = Cell(loss_number(loss.lowest.value), at)
    if loss.last is not None:
        notes = [change(loss.before.value, loss.last.value)] if loss.before is not None else []
        if loss.last.step != record.steps:
            notes.append(f"step {loss.last.step}")
        cells["last validation loss"] = Cell(loss_number(loss.last.value), ", ".join(notes))
    return cells
