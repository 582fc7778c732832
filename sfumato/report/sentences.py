"""The report's sentences: what came out, what is missing, and how it was measured."""

from collections.abc import Sequence
from pathlib import Path

from sfumato.evaluation.results import Evaluation
from sfumato.report.comparison import Comparison
from sfumato.report.losses import has_held_out, loss_by_t, unlike, validation_loss
from sfumato.report.records import RunRecord
from sfumato.report.tables import change, held_out_names, loss_number, number

ABOUT_TRAINING = (
    "Training rewards are those of the batches, with other prompts and noise at every step. KL is "
    "measured where kl_coeff is not 0."
)
ABOUT_LOSSES = (
    "The validation loss is the mean error of the same images at the same noise and times, without "
    "weights, of the model that a checkpoint is used as; a ring marks the lowest. The loss in "
    "training has other images, noise and times at every step, and is weighted as the run is set."
)
ABOUT_BY_T = (
    "The loss by t is without weights: pale in the first tenth of training, full in the last, with "
    "bars of one standard error; short runs average 25 logged steps, or half of what there is."
)


def outcome(
    records: Sequence[RunRecord], base: Evaluation | None, compared: Sequence[Comparison]
) -> list[str]:
    """Say in words what the trained models reached, and which is more diverse at equal reward."""
    lines = [sentence for record in records for sentence in _reached(record)]
    finals = [record.final for record in records if record.final is not None]
    if not finals:
        return lines
    rewards = [one.reward for one in finals if one.reward is not None]
    if rewards:
        lines.append(_range("Mean reward", rewards, base and base.reward))
    diversity = [one.diversity for one in finals]
    what = "Diversity of images of the same prompt"
    lines.append(_range(what, diversity, base and base.diversity))
    for name in held_out_names(records):
        values = [one.held_out[name] for one in finals if name in one.held_out]
        own = base.held_out.get(name) if base else None
        lines.append(_range(f"Held-out score “{name}”, which nothing was trained on", values, own))
    return [*lines, *(_verdict(one) for one in compared)]


def _reached(record: RunRecord) -> list[str]:
    """Say where the validation loss of a run began and ended."""
    loss = validation_loss(record)
    if loss is None or loss.lowest is None or loss.last is None:
        return []
    text = f"Validation loss of {record.name}: "
    if loss.before is not None:
        text += f"{loss_number(loss.before.value)} before training, "
    text += f"{loss_number(loss.last.value)} at step {loss.last.step}"
    if loss.before is not None:
        text += f" ({change(loss.before.value, loss.last.value)})"
    if loss.lowest.step != loss.last.step:
        text += f"; the lowest was {loss_number(loss.lowest.value)} at step {loss.lowest.step}"
    if loss.before is not None and loss.lowest.value >= loss.before.value:
        text += ", never below where it began"
    return [f"{text}."]


def _range(what: str, values: Sequence[float], base: float | None) -> str:
    before = "" if base is None else f"{number(base)} in the base model, "
    if not values:
        return f"{what}: {before}not measured after training."
    low, high = number(min(values)), number(max(values))
    reached = low if low == high else f"{low} to {high}"
    return f"{what}: {before}{reached} after training."


def _verdict(one: Comparison) -> str:
    if one.result is None:
        return (
            f"{one.other} and {one.baseline} reach no common reward above the base model, so "
            "that their diversity cannot be compared at equal reward."
        )
    gap, first = one.result.mean_difference, one.result.baseline_diversity[0]
    word = "more" if gap > 0 else "less"
    span = f"{number(one.result.levels[0])} to {number(one.result.levels[-1])}"
    return (
        f"At equal reward, {one.other} is {word} diverse than {one.baseline}: by "
        f"{number(abs(gap), first)} on average over rewards from {span}."
    )


def gaps(records: Sequence[RunRecord], base: Evaluation | None) -> list[str]:
    """Say what the run folders do not hold."""
    lines = []
    for record in records:
        if not record.metrics:
            lines.append(f"{record.name} has no metrics.jsonl: its training curves are missing.")
        if record.supervised:
            lines += _unmeasured(record)
        if record.final is None:
            lines.append(
                f"No checkpoint of {record.name} is evaluated: run sfumato evaluate "
                f"run={record.folder.path}.{_validated(record)}"
            )
    if base is None and any(record.evaluations for record in records):
        lines.append("The base model is not evaluated: evaluate step 0 of one of the runs.")
    supervised = [record for record in records if validation_loss(record) is not None]
    if odd := unlike(supervised):
        names = ", ".join(record.name for record in supervised)
        lines.append(
            f"The validation losses of {names} are not of the same thing (these settings differ: "
            f"{', '.join(odd)}): read each beside its own value before training."
        )
    return lines


def _unmeasured(record: RunRecord) -> list[str]:
    """Say what a supervised run did not measure."""
    lines = []
    if validation_loss(record) is None:
        lines.append(
            f"{record.name} has no validation loss: it is off (validation.loss_images = 0), or no "
            "validation was reached."
        )
    elif not has_held_out(record):
        lines.append(
            f"{record.name} has no images that are held out (validation.images): its validation "
            "loss is of images that it was trained on, and does not show overfitting."
        )
    if record.metrics and loss_by_t(record) is None:
        lines.append(f"{record.name} logged too little for its loss by t.")
    if not any((record.folder.path / "samples").glob("step-*")):
        lines.append(f"{record.name} has no validation images.")
    return lines


def _validated(record: RunRecord) -> str:
    steps, rewards = record.series("validation/reward")
    if not steps:
        return ""
    return (
        f" Its last validation, at step {steps[-1]:g}, had a mean reward of {number(rewards[-1])}."
    )


def about_panels(records: Sequence[RunRecord], base: Evaluation | None) -> str:
    """Say how to read the curves."""
    parts = []
    if base is not None:
        bars = "" if base.reward is None else ", and rewards bars of one standard error"
        parts.append(f"Evaluated quantities have a mark at each evaluated step{bars}.")
    if not all(record.supervised for record in records):
        parts.append(ABOUT_TRAINING)
    if any(record.supervised for record in records):
        parts.append(ABOUT_LOSSES)
    if any(loss_by_t(record) is not None for record in records):
        parts.append(ABOUT_BY_T)
    return " ".join(parts)


def method(records: Sequence[RunRecord]) -> str:
    """Say what the numbers of the evaluation are."""
    settings = next((r.evaluated_with for r in records if r.evaluated_with is not None), None)
    if settings is None:
        return ""
    scored = any(one.reward is not None for record in records for one in record.evaluations)
    error = "After ± stands the standard error of the mean over noise, the prompts held fixed; "
    smaller = "the smaller figure is the difference from the base model"
    explained = f"{error}{smaller}" if scored else smaller.capitalize()
    sampler = settings["sampler"]
    features = Path(settings["features"])
    return (
        f"{settings['num_images']} images of each of {len(settings['prompts'])} prompts, from "
        f"the same starting noise (seed {settings['seed']}) for every model; "
        f"{sampler['num_inference_steps']} sampling steps, guidance scale "
        f"{sampler['guidance_scale']:g}. {explained}. "
        f"Image features for diversity: {features.name if features.is_absolute() else features}."
    )
