"""Report: a self-contained HTML page that depends on run folders only."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import sfumato
from sfumato.evaluation.results import Evaluation
from sfumato.files import write_text
from sfumato.report.comparison import Comparison, compare, steps_at_equal_reward
from sfumato.report.figures import COLORS, SYMBOLS, draw_panel, draw_tradeoff, training_panels
from sfumato.report.losses import differing_losses, has_held_out, loss_by_t, validation_loss
from sfumato.report.pictures import before_and_after, image_grids, validation_grid, validations
from sfumato.report.records import RunRecord, read_runs
from sfumato.report.tables import (
    difference_table,
    equal_reward_table,
    number,
    origin_table,
    summary_table,
)
from sfumato.training.folder import RunFolder

TEMPLATE = Path(__file__).with_name("report.html")
ABOUT_TRAINING = (
    "Rewards in training are those of each step's batch, so prompts and noise change at every "
    "step. KL is measured where kl_coeff is not 0."
)
ABOUT_LOSSES = (
    "The validation loss is the unweighted mean error over fixed images, noise and times, of the "
    "weights that a checkpoint is used with; a ring marks the lowest. The loss in training has new "
    "images, noise and times at every step, and the weighting that the run sets."
)
ABOUT_BY_T = (
    "The loss by t is unweighted. Pale: the first tenth of training; full color: the last tenth. "
    "Bars show one standard error. In short runs each end is 25 logged steps, or half of them."
)


def write_report(runs: Sequence[RunFolder], out: Path, *, title: str, notes: str = "") -> Path:
    """Write an HTML page that compares runs with each other and the base model.

    Args:
        runs: folders with a config.yaml at least; the page names whatever else is missing.
        out: the file to write.
        notes: plain text for the head of the page; an empty line separates paragraphs.

    Returns:
        `out`.

    Raises:
        ValueError: if a folder cannot be read, two runs were evaluated differently, or the page
            cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = {
        "title": title,
        "notes": [part.strip() for part in notes.split("\n\n") if part.strip()],
        "version": sfumato.__version__,
        **_content(read_runs(runs)),
    }
    write_text(out, environment.get_template(TEMPLATE.name).render(page=page))
    return out


def _breakable(name: str) -> Markup:
    """Let the name of a run break after an underscore in a narrow column."""
    return Markup("_<wbr>").join(name.split("_"))


def _content(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the template shows."""
    evaluated = [(record, record.base) for record in records if record.base is not None]
    # Prefer an evaluation of the base model that has rewards.
    base_run, base = max(evaluated, key=lambda one: one[1].reward is not None, default=(None, None))
    compared = compare(records, base)
    first = [("base model", base_run, 0)] if base_run else []
    last = [(record.name, record, record.final.step) for record in records if record.final]
    equal = [(record.name, record, step) for record, step in steps_at_equal_reward(records, base)]
    unseen = [record for record in records if not record.supervised and not record.evaluations]
    tradeoff = draw_tradeoff(records, base)
    legend = zip(records, itertools.cycle(COLORS), itertools.cycle(SYMBOLS))
    return {
        "sentences": [_conclusion(one) for one in compared],
        "gaps": _gaps(records, base),
        "summary": summary_table(records, base),
        "method": _method(records),
        "legend": [(record.name, color, symbol) for record, color, symbol in legend],
        "has_base": base is not None,
        "panels": [Markup(draw_panel(panel)) for panel in training_panels(records, base)],
        "about_panels": _about_panels(records, base),
        "tradeoff": None if tradeoff is None else Markup(tradeoff),
        "comparisons": [
            equal_reward_table(one.baseline, one.other, one.result)
            for one in compared
            if one.result is not None
        ],
        "courses": [grid for r in records if r.supervised and (grid := before_and_after(r))],
        "equal_grids": image_grids([*first, *equal]) if any(c not in last for c in equal) else [],
        "last_grids": image_grids([*first, *last]),
        "has_rewards": any(record.final and record.final.reward is not None for record in records),
        "pairs": [grid for r in unseen if (grid := validation_grid(r))],
        "origins": origin_table(records),
        "differences": difference_table(records),
        "configs": [(r.name, r.folder.config.read_text(encoding="utf-8")) for r in records],
    }


def _conclusion(one: Comparison) -> str:
    if one.result is None:
        return (
            f"{one.other} and {one.baseline} reach no common reward above the base model, so "
            "their diversity cannot be compared at equal reward."
        )
    gap, first = one.result.mean_difference, one.result.baseline_diversity[0]
    span = f"{number(one.result.levels[0])} to {number(one.result.levels[-1])}"
    difference = number(abs(gap), first)
    if not float(difference):
        relation = f"as diverse as {one.baseline}"
    else:
        word = "more" if gap > 0 else "less"
        relation = f"{word} diverse than {one.baseline}: by {difference}"
    return f"At equal reward, {one.other} is {relation} on average over rewards from {span}."


def _gaps(records: Sequence[RunRecord], base: Evaluation | None) -> list[str]:
    """Name what the run folders lack."""
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


def _about_panels(records: Sequence[RunRecord], base: Evaluation | None) -> list[str]:
    """Explain the curves."""
    parts = []
    if base is not None:
        bars = "" if base.reward is None else "; rewards have bars of one standard error"
        parts.append(f"Evaluated quantities have a mark at each evaluated step{bars}.")
    if not all(record.supervised for record in records):
        parts.append(ABOUT_TRAINING)
    if any(record.supervised for record in records):
        parts.append(ABOUT_LOSSES)
    if any(loss_by_t(record) is not None for record in records):
        parts.append(ABOUT_BY_T)
    return parts


def _method(records: Sequence[RunRecord]) -> str:
    """Explain the numbers of the evaluation."""
    evaluations = [one for record in records for one in record.evaluations]
    if not evaluations:
        return ""
    settings, error = evaluations[0].settings, ""
    if any(one.reward is not None for one in evaluations):
        error = "± is the standard error of the mean over noise, with the prompts held fixed. "
    sampler = settings["sampler"]
    features = Path(settings["features"])
    return (
        f"{settings['num_images']} images of each of {len(settings['prompts'])} prompts, from "
        f"the same starting noise (seed {settings['seed']}) for every model; "
        f"{sampler['num_inference_steps']} sampling steps, guidance scale "
        f"{sampler['guidance_scale']:g}. {error}Small figures are differences from the base model. "
        f"Image features for diversity: {features.name if features.is_absolute() else features}."
    )
