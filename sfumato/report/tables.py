"""Tables of the report, and the format of their numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.config.saved import flatten
from sfumato.evaluation.results import EqualReward, Evaluation
from sfumato.report.comparison import guidance_of
from sfumato.report.losses import validation_loss
from sfumato.report.records import RunRecord

MINUS, PLUS_MINUS, NONE = "−", "±", "–"
HELD_OUT = "held-out score "  # distinguishes a score's column from others of the same name
VALIDATED = "validation/held_out/"  # begins the metric of a score
LOSSES = ("images seen", "validation loss before", "lowest validation loss", "last validation loss")


@dataclass(frozen=True)
class Cell:
    """A value and a smaller note that belongs to it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def number(value: float, like: float | None = None, *, sign: bool = False) -> str:
    """Format a number with the decimals that suit its size, or the size of `like`."""
    if not math.isfinite(value):
        return NONE
    size = abs(value if like is None else like)
    decimals = 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def summary_table(records: Sequence[RunRecord], base: Evaluation | None) -> Table:
    """Return one row per model: its training, and the measures of its last evaluation."""
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


def variant_table(records: Sequence[RunRecord]) -> Table | None:
    """Return one row per evaluated variant, or None without any."""
    ones = [(record, one) for record in records for one in record.variants]
    if not ones:
        return None
    label, held_out = ones[0][1].diversity_label, held_out_names(records)
    rows = []
    for record, one in ones:
        scores = _scores(one, None, label)
        rows.append(
            [
                Cell(record.name if one.step else "base model"),
                Cell(str(one.step)),
                Cell(one.variant.schedule),
                Cell(f"{one.variant.lora_scale:g}"),
                Cell(f"{guidance_of(one):g}"),
                *(
                    scores.get(key, Cell(NONE))
                    for key in ("reward", *(f"{HELD_OUT}{name}" for name in held_out), label)
                ),
            ]
        )
    scales = ["LoRA scale", "guidance scale"]
    header = ["model", "step", "schedule", *scales, "reward", *held_out, label]
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
    rows = [[Cell("starts"), *(Cell(str(len(record.starts))) for record in records)]]
    for key in dict.fromkeys(key for start in last for key in start):
        values = [start.get(key) for start in last]
        texts = [NONE if value is None else str(value) for value in values]
        if key == "commit":
            texts = [text[:12] for text in texts]
        rows.append([Cell(key.replace("_", " ")), *map(Cell, texts)])
    return Table("", ["", *(record.name for record in records)], rows)


def difference_table(records: Sequence[RunRecord]) -> Table | None:
    """Return the settings in which the runs differ, or None where they do not."""
    settings = [flatten(record.settings) for record in records]
    rows = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [one.get(key, NONE) for one in settings]
        if key not in ("name", "runs_dir") and any(value != values[0] for value in values):
            texts = ["null" if value is None else str(value) for value in values]
            rows.append([Cell(key), *map(Cell, texts)])
    return Table("", ["", *(record.name for record in records)], rows) if rows else None


def held_out_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the held-out scores of all runs."""
    return list(dict.fromkeys(n for r in records for one in r.evaluations for n in one.held_out))


def validated_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the held-out scores that validation alone measured."""
    keys = dict.fromkeys(key for r in records for row in r.metrics for key in row)
    names = [key.removeprefix(VALIDATED) for key in keys if key.startswith(VALIDATED)]
    return [name for name in names if name not in held_out_names(records)]


def _scores(one: Evaluation, base: Evaluation | None, label: str) -> dict[str, Cell]:
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
    loss, seen = validation_loss(record), record.images_seen
    if not record.supervised:
        return {}
    cells = {LOSSES[0]: Cell(str(seen))} if seen is not None else {}
    before = loss.before.value if loss and loss.before else None
    if before is not None:
        cells[LOSSES[1]] = Cell(_loss_number(before))
    if loss and loss.lowest and loss.last:
        cells[LOSSES[2]] = Cell(_loss_number(loss.lowest.value), f"step {loss.lowest.step}")
        change = 100 * (loss.last.value - before) / before if before else None
        notes = [] if change is None else [f"{number(change, 100.0, sign=True)}%"]
        if loss.last.step != record.steps:
            notes.append(f"step {loss.last.step}")
        cells[LOSSES[3]] = Cell(_loss_number(loss.last.value), ", ".join(notes))
    return cells


def _loss_number(value: float) -> str:
    """Format a loss, whose last digits count."""
    return number(value, value / 100)
