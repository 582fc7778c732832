"""The report's sentences: what came out, what is missing, and how it was measured."""

from collections.abc import Sequence
from pathlib import Path

from sfumato.evaluation.comparison import Comparison
from sfumato.evaluation.records import RunRecord
from sfumato.evaluation.results import Evaluation
from sfumato.evaluation.tables import held_out_names, number


def outcome(
    records: Sequence[RunRecord], base: Evaluation | None, compared: Sequence[Comparison]
) -> list[str]:
    """Say in words what the trained models reached, and which is more diverse at equal reward."""
    finals = [record.final for record in records if record.final is not None]
    if not finals:
        return []
    lines = [
        _range("Mean reward", [one.reward for one in finals], base and base.reward),
        _range(
            "Diversity of images of the same prompt",
            [one.diversity for one in finals],
            base and base.diversity,
        ),
    ]
    for name in held_out_names(records):
        values = [one.held_out[name] for one in finals if name in one.held_out]
        own = base.held_out.get(name) if base else None
        lines.append(_range(f"Held-out score “{name}”, which nothing was trained on", values, own))
    return [*lines, *(_verdict(one) for one in compared)]


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
        if record.final is None:
            lines.append(
                f"No checkpoint of {record.name} is evaluated: run sfumato evaluate "
                f"run={record.folder.path}.{_validated(record)}"
            )
    if base is None and any(record.evaluations for record in records):
        lines.append("The base model is not evaluated: evaluate step 0 of one of the runs.")
    return lines


def _validated(record: RunRecord) -> str:
    steps, rewards = record.series("validation/reward")
    if not steps:
        return ""
    return (
        f" Its last validation, at step {steps[-1]:g}, had a mean reward of {number(rewards[-1])}."
    )


def method(records: Sequence[RunRecord]) -> str:
    """Say what the numbers of the evaluation are."""
    settings = next((r.evaluated_with for r in records if r.evaluated_with is not None), None)
    if settings is None:
        return ""
    sampler = settings["sampler"]
    features = Path(settings["features"])
    return (
        f"{settings['num_images']} images of each of {len(settings['prompts'])} prompts, from "
        f"the same starting noise (seed {settings['seed']}) for every model; "
        f"{sampler['num_inference_steps']} sampling steps, guidance scale "
        f"{sampler['guidance_scale']:g}. After ± stands the standard error of the mean over "
        "noise, the prompts held fixed; the smaller figure is the difference from the base model. "
        f"Image features for diversity: {features.name if features.is_absolute() else features}."
    )
