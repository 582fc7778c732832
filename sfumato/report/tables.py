"""Tables of the report, and the format of their numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sfumato.config.saved import flatten
from sfumato.evaluation.measures import metric_label
from sfumato.evaluation.results import EqualReward, Evaluation
from sfumato.files import compact
from sfumato.report.comparison import guidance_of
from sfumato.report.cost import cost
from sfumato.report.differences import DIVERSITY, HELD_OUT, REWARD, Difference, means
from sfumato.report.losses import validation_loss
from sfumato.report.records import RunRecord

MINUS, PLUS_MINUS, NONE = "−", "±", "–"
VALIDATED = "validation/held_out/"  # begins the metric of a score
LOSSES = ("validation loss before", "lowest validation loss", "last validation loss")
COSTS = ("seconds", "images", "reward queries")
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Cell:
    """A value and a smaller note that belongs to it.

    Attributes:
        values: unrounded numbers by name, for sorting and downloads; "" names the value itself.
    """

    text: str
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


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


def summary_table(
    records: Sequence[RunRecord],
    base: Evaluation | None,
    found: Mapping[str, Mapping[str, Difference]],
) -> Table:
    """Return one row per model: its training, the scores of its last evaluation, and their cost.

    Args:
        found: differences from the base model, by the run's name.
    """
    losses = LOSSES if any(record.supervised for record in records) else ()
    scores = score_names(records)
    rows = []
    if base is not None:
        cells = {"model": Cell("base model"), "steps": _count(0)}
        rows.append(cells | _scores(base, {}))
    for record in records:
        final = record.final
        partly = final is not None and final.step != record.steps
        note = f"evaluated at {final.step}" if final is not None and partly else ""
        cells = {
            "model": Cell(record.name),
            "objective": Cell(record.objective),
            "steps": replace(_count(record.steps), note=note),
        }
        if final is not None:
            cells |= _scores(final, found.get(record.name, {}))
        else:
            missing = [name for name in scores if record.scored or name != REWARD]
            cells |= {name: Cell("not evaluated") for name in missing}
        rows.append(cells | _losses(record) | _costs(record, final.step if final else record.steps))
    return _table("", ["model", "objective", "steps", *losses, *scores, *COSTS], rows, records)


def evaluation_table(records: Sequence[RunRecord], base: Evaluation | None) -> Table | None:
    """Return one row per evaluated step and variant, or None without any."""
    rows = [
        cells | _scores(one, {}) | (_costs(record, one.step) if one.step else {})
        for cells, record, one in _evaluated(records, base)
    ]
    header = ["model", "step", *_ways(records), *score_names(records), *COSTS]
    return _table("", header, rows, records) if rows else None


def metric_tables(records: Sequence[RunRecord], base: Evaluation | None) -> list[Table]:
    """Return the metrics of sets of images: a table for each network and reference.

    Numbers of two manifests are never in one table.
    """
    tables: dict[bytes, tuple[dict[str, Any], dict[int, dict[str, Cell]]]] = {}
    labels: dict[str, None] = {}
    for i, (cells, _, one) in enumerate(_evaluated(records, base)):
        for name, metric in one.metrics.items():
            label = metric_label(name, metric)
            _, rows = tables.setdefault(compact(metric.manifest), (metric.manifest, {}))
            rows.setdefault(i, dict(cells))[label] = Cell(
                number(metric.value), "", {"": metric.value}
            )
            labels[label] = None
    found = []
    for manifest, rows in tables.values():
        own = [label for label in labels if any(label in row for row in rows.values())]
        header = ["model", "step", *_ways(records), *own]
        found.append(_table(_measured_by(manifest), header, list(rows.values()), records))
    return found


def _measured_by(manifest: Mapping[str, Any]) -> str:
    """Say by which network, and against what, a metric was measured."""
    network, reference = manifest.get("network", {}), manifest.get("reference")
    text = f"Features of {network.get('kind', 'a network')}"
    if (sum_ := network.get("sha256")) is not None:
        text += f" (SHA-256 {str(sum_)[:8]})"
    if reference is not None:
        text += f", against {reference['count']:,} pictures (SHA-256 {reference['sha256'][:8]})"
    return text


def _evaluated(
    records: Sequence[RunRecord], base: Evaluation | None
) -> list[tuple[dict[str, Cell], RunRecord, Evaluation]]:
    """Return every evaluation, with the cells that name it."""
    ones = [("base model", records[0], base)] if base is not None else []
    ones += [(r.name, r, one) for r in records for one in r.evaluations if one.step]
    ones += [(r.name if one.step else "base model", r, one) for r in records for one in r.variants]
    found = []
    for name, record, one in ones:
        cells = {"model": Cell(name), "step": _count(one.step)}
        if _ways(records):
            cells |= {
                "schedule": Cell(one.variant.schedule),
                "LoRA scale": _plain(one.variant.lora_scale),
                "guidance scale": _plain(guidance_of(one)),
            }
        found.append((cells, record, one))
    return found


def _ways(records: Sequence[RunRecord]) -> list[str]:
    """Return the columns that say how images were made; [] without variants."""
    some = any(record.variants for record in records)
    return ["schedule", "LoRA scale", "guidance scale"] if some else []


def run_difference_table(
    baseline: str, found: Mapping[str, Mapping[str, Difference]], records: Sequence[RunRecord]
) -> Table:
    """Return the differences of runs from one of them, by the other's name."""
    rows = [
        {"model": Cell(name)}
        | {score: _difference(each, each.mean) for score, each in differences.items()}
        for name, differences in found.items()
    ]
    header = ["model", *score_names(records)]
    return _table(f"Last evaluations, minus {baseline}", header, rows, records)


def score_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the scores that runs are compared by; [] of runs without any."""
    rewards = [REWARD] if any(record.scored for record in records) else []
    if not rewards and not any(record.evaluations for record in records):
        return []
    return [*rewards, *(f"{HELD_OUT}{name}" for name in held_out_names(records)), DIVERSITY]


def equal_reward_table(
    baseline: str, other: str, result: EqualReward, ends: tuple[float, float] | None
) -> Table:
    """Return the diversities of two runs, level by level, and their mean difference."""
    rows = [
        [
            *(Cell(number(value), "", {"": value}) for value in (level, a, b)),
            Cell(number(b - a, a, sign=True), "", {"": b - a}),
        ]
        for level, a, b in zip(
            result.levels, result.baseline_diversity, result.other_diversity, strict=True
        )
    ]
    mean = Difference(result.mean_difference, ends)
    difference = _difference(mean, result.baseline_diversity[0])
    rows.append([Cell("mean"), Cell(""), Cell(""), difference])
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


def _table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Mapping[str, Cell]],
    records: Sequence[RunRecord],
) -> Table:
    label = next((r.evaluations[0].diversity_label for r in records if r.evaluations), DIVERSITY)
    shown = {DIVERSITY: label}
    shown |= {f"{HELD_OUT}{name}": f"{name} (held out)" for name in held_out_names(records)}
    empty = [
        name for name in COSTS if all(row[name].text == UNKNOWN for row in rows if name in row)
    ]
    header = [name for name in header if name not in empty]
    cells = [[row.get(name, Cell(NONE)) for name in header] for row in rows]
    return Table(caption, [shown.get(name, name) for name in header], cells)


def _scores(one: Evaluation, found: Mapping[str, Difference]) -> dict[str, Cell]:
    """Return the scores of an evaluation; differences from the base model are notes."""
    cells = {}
    for name, value in means(one).items():
        text, values = number(value), {"": value}
        if name == REWARD and one.reward_error is not None:
            text += f" {PLUS_MINUS} {number(one.reward_error, value)}"
            values["error"] = one.reward_error
        if name in found:
            other = _difference(found[name], value)
            values |= {key or "difference": v for key, v in other.values.items()}
            cells[name] = Cell(text, f"{other.text} {other.note}".strip(), values)
        else:
            cells[name] = Cell(text, "", values)
    return cells


def _difference(found: Difference, like: float) -> Cell:
    values = {"": found.mean}
    if found.ends is None:
        return Cell(number(found.mean, like, sign=True), "", values)
    low, high = (number(end, like, sign=True) for end in found.ends)
    values |= {"low": found.ends[0], "high": found.ends[1]}
    return Cell(number(found.mean, like, sign=True), f"[{low}, {high}]", values)


def _costs(record: RunRecord, step: int) -> dict[str, Cell]:
    numbers = zip(COSTS, vars(cost(record, step)).values(), strict=True)
    return {name: Cell(UNKNOWN) if v is None else _count(v) for name, v in numbers}


def _count(value: float) -> Cell:
    exact = value < 10 and value != int(value)  # seconds of a short run
    return Cell(f"{value:.2g}" if exact else f"{value:,.0f}", "", {"": value})


def _plain(value: float) -> Cell:
    return Cell(f"{value:g}", "", {"": value})


def _losses(record: RunRecord) -> dict[str, Cell]:
    loss = validation_loss(record)
    if not record.supervised or not loss:
        return {}
    cells = {}
    before = loss.before.value if loss.before else None
    if before is not None:
        cells[LOSSES[0]] = _loss(before)
    if loss.lowest and loss.last:
        cells[LOSSES[1]] = _loss(loss.lowest.value, f"step {loss.lowest.step}")
        change = 100 * (loss.last.value - before) / before if before else None
        notes = [] if change is None else [f"{number(change, 100.0, sign=True)}%"]
        if loss.last.step != record.steps:
            notes.append(f"step {loss.last.step}")
        cells[LOSSES[2]] = _loss(loss.last.value, ", ".join(notes))
    return cells


def _loss(value: float, note: str = "") -> Cell:
    return Cell(number(value, value / 100), note, {"": value})  # its last digits count
