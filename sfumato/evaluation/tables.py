"""The report's tables of numbers, and how a number is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.evaluation.records import RunRecord, differing
from sfumato.evaluation.results import EqualReward, Evaluation

MINUS, PLUS_MINUS = "−", "±"


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
        return "–"
    size = abs(value if like is None else like)
    decimals = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def summary_table(records: Sequence[RunRecord], base: Evaluation | None) -> Table:
    """Return one row per model: what was trained, and what its last evaluation measured."""
    held_out = held_out_names(records)
    label = next((r.evaluations[0].diversity_label for r in records if r.evaluations), "diversity")
    header = ["model", "objective", "steps", "reward", *held_out, label]
    rows = []
    if base is not None:
        rows.append([Cell("base model"), Cell("–"), Cell("0"), *_scores(base, None, held_out)])
    for record in records:
        final = record.final
        scores = (
            [Cell("not evaluated")] * (len(held_out) + 2)
            if final is None
            else _scores(final, base, held_out)
        )
        partly = final is not None and final.step != record.steps
        note = f"evaluated at {final.step}" if final is not None and partly else ""
        rows.append(
            [Cell(record.name), Cell(record.objective), Cell(str(record.steps), note), *scores]
        )
    return Table("", header, rows)


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
        shown = ["–" if value is None else str(value) for value in values]
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


def _scores(one: Evaluation, base: Evaluation | None, held_out: Sequence[str]) -> list[Cell]:
    """Return reward, held-out scores and diversity, each with its distance from the base."""

    def against(value: float, own: float | None) -> str:
        return "" if own is None else number(value - own, value, sign=True)

    error = f" {PLUS_MINUS} {number(one.reward_error, one.reward)}"
    cells = [Cell(number(one.reward) + error, against(one.reward, base and base.reward))]
    for name in held_out:
        if name not in one.held_out:
            cells.append(Cell("–"))
            continue
        own = base.held_out.get(name) if base else None
        cells.append(Cell(number(one.held_out[name]), against(one.held_out[name], own)))
    cells.append(Cell(number(one.diversity), against(one.diversity, base and base.diversity)))
    return cells
