"""Report: a self-contained HTML page that depends on run folders only."""

import base64
import itertools
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import sfumato
from sfumato.evaluation.bootstrap import MIN_PROMPTS
from sfumato.evaluation.results import Evaluation
from sfumato.files import write_text
from sfumato.report.album import album
from sfumato.report.comparison import compare
from sfumato.report.differences import differences, scored
from sfumato.report.figures import (
    COLORS,
    MOST_POINTS,
    SYMBOLS,
    Panel,
    draw_panel,
    draw_tradeoffs,
    draw_variants,
    training_panels,
)
from sfumato.report.gauges import gauge_panels
from sfumato.report.guidance import draw_guidance
from sfumato.report.losses import differing_losses, has_held_out, loss_by_t, validation_loss
from sfumato.report.pictures import Picture, validations
from sfumato.report.records import RunRecord, read_runs
from sfumato.report.tables import (
    difference_table,
    equal_reward_table,
    evaluation_table,
    metric_tables,
    number,
    origin_table,
    run_difference_table,
    summary_table,
)
from sfumato.training.folder import RunFolder

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPT = Path(__file__).with_name("report.js")
# The end of every report; those of earlier versions have no sum of what stands before it.
_MARK = re.compile(
    rb"<footer>Written by Sfumato [^<]{1,40}</footer>\s*</body>\s*</html>\s*"
    rb"(?P<line><!-- SHA-256 of the page: (?P<sum>[0-9a-f]{64}) -->\s*)?\Z"
)


def write_report(runs: Sequence[RunFolder], out: Path, *, title: str, notes: str = "") -> Path:
    """Write an HTML page that compares runs with each other and the base model.

    Args:
        runs: folders with a config.yaml at least; the page names whatever else is missing.
        out: the file to write; an earlier report is replaced.
        notes: plain text for the head of the page; an empty line separates paragraphs.

    Returns:
        `out`.

    Raises:
        ValueError: if a folder cannot be read, two runs were evaluated differently, or the page
            cannot be written, or `out` is something else than a report.
    """
    refuse_other(out)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": lambda name: Markup("_<wbr>").join(name.split("_")),  # in a narrow column
        "number": number,
    }
    script = SCRIPT.read_text(encoding="utf-8")
    page = {
        "title": title,
        "script": Markup(script),
        "script_hash": f"sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}",
        "notes": [part.strip() for part in notes.split("\n\n") if part.strip()],
        "version": sfumato.__version__,
        **_content(read_runs(runs)),
    }
    html = environment.get_template(TEMPLATE.name).render(page=page)
    # A text of a run may hold lone surrogates, which no file can.
    whole = html.encode(errors="replace") + b"\n"
    line = f"<!-- SHA-256 of the page: {sha256(whole).hexdigest()} -->\n"
    write_text(out, whole.decode() + line)
    return out


def refuse_other(out: Path) -> None:
    """Refuse to replace what is no report of Sfumato.

    Raises:
        ValueError: naming it.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give a file, such as {out / 'report.html'}")
    if os.path.lexists(out) and not (out.is_file() and _is_report(out.read_bytes())):
        raise ValueError(
            f"{out} is in the way, and no report as Sfumato wrote it; give another file (--out)"
        )


def _is_report(page: bytes) -> bool:
    """Say whether Sfumato wrote a page, and nobody has edited it since."""
    mark = _MARK.search(page, max(0, len(page) - 300))
    return mark is not None and (
        mark["sum"] is None
        or sha256(page[: mark.start("line")]).hexdigest() == mark["sum"].decode()
    )


def _content(records: Sequence[RunRecord]) -> dict[str, Any]:
    evaluated = [(record, record.base) for record in records if record.base is not None]
    # Prefer an evaluation of the base model that has rewards.
    base_run, base = max(evaluated, key=lambda one: one[1].reward is not None, default=(None, None))
    evaluations = [one for record in records for one in record.evaluations]
    compared = compare(records, base)
    legend = zip(records, itertools.cycle(COLORS), itertools.cycle(SYMBOLS))
    images = album(records, base_run, base)
    curves, unlike = _guidance(records)
    return {
        "compared": compared,
        "gaps": [*_gaps(records, base), *_refused_pictures(images.pictures), *unlike],
        **_results(records, base_run, base),
        "method": evaluations[0].settings if evaluations else None,
        "features": _features(evaluations[0]) if evaluations else "",
        "has_errors": any(one.reward is not None for one in evaluations),
        "legend": [(record.name, color, symbol) for record, color, symbol in legend],
        "base": base,
        "panels": _drawn(training_panels(records, base)),
        "gauges": _drawn(gauge_panels(records)),
        "has_sampled": not all(record.supervised for record in records),
        "has_supervised": any(record.supervised for record in records),
        "has_loss_by_t": any(loss_by_t(record) is not None for record in records),
        "tradeoffs": [
            {"name": name, "svg": Markup(svg)} for name, svg in draw_tradeoffs(records, base)
        ],
        "variant_figures": [
            {"name": f"variants of {record.name}", "svg": Markup(svg)}
            for record in records
            if (svg := draw_variants(record, base)) is not None
        ],
        "guidance": curves,
        "comparisons": [
            equal_reward_table(one.baseline, one.other, one.result, one.ends)
            for one in compared
            if one.result is not None
        ],
        "images": images,
        "most_points": MOST_POINTS,
        "num_steps": len({one.step for r in records for one in r.evaluations if one.step}),
        "has_rewards": any(record.final and record.final.reward is not None for record in records),
        "origins": origin_table(records),
        "differences": difference_table(records),
        "configs": [(r.name, r.folder.config.read_text(encoding="utf-8")) for r in records],
    }


def _guidance(records: Sequence[RunRecord]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the curves of runs over guidance, and what is said of those that are left out."""
    curves, said = [], []
    for record in records:
        try:
            svg = draw_guidance([*record.evaluations, *record.variants])
        except ValueError as error:
            said.append(f"{record.name} has no curve over guidance: {error}.")
            continue
        if svg is not None:
            curves.append({"name": f"guidance of {record.name}", "svg": Markup(svg)})
    return curves, said


def _results(
    records: Sequence[RunRecord], base_run: RunRecord | None, base: Evaluation | None
) -> dict[str, Any]:
    """Return the tables of scores, with the differences from the base model and between runs."""
    finals = {r.name: scored(r, r.final) for r in records if r.final is not None}
    start = scored(base_run, base) if base_run is not None and base is not None else None
    found = {name: differences(start, one) for name, one in finals.items()} if start else {}
    baseline, *others = finals or [""]
    between = {name: differences(finals[baseline], finals[name]) for name in others}
    every = [each for one in (*found.values(), *between.values()) for each in one.values()]
    return {
        "summary": summary_table(records, base, found),
        "between": run_difference_table(baseline, between, records) if between else None,
        "every_evaluation": evaluation_table(records, base),
        "metrics": metric_tables(records, base),
        "has_differences": bool(every),
        "has_intervals": any(each.ends is not None for each in every),
        "fewest": MIN_PROMPTS,
    }


def _drawn(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    return [{"name": panel.title, "svg": Markup(draw_panel(panel))} for panel in panels]


def _features(evaluation: Evaluation) -> str:
    path = Path(evaluation.settings["features"])
    return path.name if path.is_absolute() else str(path)


def _refused_pictures(pictures: Sequence[Picture]) -> list[str]:
    paths = list(dict.fromkeys(picture.outside for picture in pictures if picture.outside))
    if not paths:
        return []
    return [
        f"Pictures outside the run folders are not shown, nor are links that lead there: "
        f"{len(paths)}, the first is {paths[0]}."
    ]


def _gaps(records: Sequence[RunRecord], base: Evaluation | None) -> list[str]:
    lines = [f"{record.name} {gap}" for record in records for gap in _run_gaps(record)]
    if base is None and any(record.evaluations for record in records):
        lines.append("The base model is not evaluated: evaluate step 0 of one of the runs.")
    supervised = [record for record in records if validation_loss(record) is not None]
    if keys := differing_losses(supervised):
        names = ", ".join(record.name for record in supervised)
        lines.append(
            f"The validation losses of {names} cannot be compared, because these settings differ: "
            f"{', '.join(keys)}. Compare each with its own value before training."
        )
    return lines


def _run_gaps(record: RunRecord) -> list[str]:
    gaps = []
    if not record.metrics:
        gaps.append("has no metrics.jsonl: its training curves are missing.")
    if record.lost:
        gaps.append(
            f"has lines in metrics.jsonl that are no row with a step: {len(record.lost)}, the "
            f"first is line {record.lost[0]}. A kill may cut a line; they are left out."
        )
    if record.unlike:
        gaps.append(
            f"has variants that were evaluated with other settings: {len(record.unlike)}, the "
            f"first is {record.unlike[0]}. They are left out; evaluate them again."
        )
    if record.supervised:
        if validation_loss(record) is None:
            gaps.append(
                "has no validation loss: it is off (validation.loss_images = 0), or no validation "
                "was reached."
            )
        elif not has_held_out(record):
            gaps.append(
                "has no held-out images (validation.images): its validation loss is measured on "
                "training images and does not show overfitting."
            )
        if record.metrics and loss_by_t(record) is None:
            gaps.append("logged too few steps for its loss by t.")
        if not validations(record):
            gaps.append("has no validation images.")
    if record.final is None:
        steps, rewards = record.series("validation/reward")
        last = f" Its last validation, at step {steps[-1]:g}," if steps else ""
        last += f" had a mean reward of {number(rewards[-1])}." if rewards else ""
        command = f"sfumato evaluate run={record.folder.path}"
        gaps.append(f"has no evaluated checkpoint: run {command}.{last}")
    return gaps
