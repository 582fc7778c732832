"""Curves of reward against diversity: runs with and without a KL, and variants of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sfumato.evaluation.results import (
    EqualReward,
    Evaluation,
    Variant,
    at_equal_reward,
    equal_reward_interval,
)
from sfumato.report.records import RunRecord


@dataclass(frozen=True)
class Comparison:
    """A run with KL beside a run without; `result` is None where they share no reward.

    Attributes:
        ends: of the interval of 95 % of the mean difference, if there is one.
    """

    baseline: str
    other: str
    result: EqualReward | None
    ends: tuple[float, float] | None


def compare(records: Sequence[RunRecord], base: Evaluation | None) -> list[Comparison]:
    """Compare each run with KL to one of each objective without, of its seed if there is one."""
    plain = [r for r in records if r.kl_coeff == 0 and r.final is not None]
    comparisons = []
    for record in (r for r in records if r.kl_coeff and r.final is not None):
        seed = record.setting("training", "seed")
        for objective in dict.fromkeys(r.objective for r in plain):
            own = [r for r in plain if r.objective == objective]
            baseline = ([r for r in own if r.setting("training", "seed") == seed] or own)[0]
            curves = from_base(baseline, base), from_base(record, base)
            result = at_equal_reward(*curves)
            comparisons.append(Comparison(baseline.name, record.name, result, _ends(*curves)))
    return comparisons


def _ends(*curves: Sequence[Evaluation]) -> tuple[float, float] | None:
    """Return the interval's ends; None of too few prompts, or where rows lack the scores."""
    try:
        found = equal_reward_interval(*curves)
    except ValueError:
        return None
    return found and found[1:]


def steps_at_equal_reward(
    records: Sequence[RunRecord], base: Evaluation | None
) -> list[tuple[RunRecord, int]]:
    """Return, for runs with a reward, the evaluated step nearest the highest mean that all reach.

    Returns:
        [] where fewer than two runs are evaluated, or one of them never rises above the base.
    """
    scored = [record for record in records if record.scored]
    curves = [
        [(one.reward, one.step) for one in r.evaluations if one.step and one.reward is not None]
        for r in scored
    ]
    if len(scored) < 2 or not all(curves):
        return []
    level = min(max(reward for reward, _ in curve) for curve in curves)
    if base is not None and base.reward is not None and level <= base.reward:
        return []
    nearest = [min(curve, key=lambda point: abs(point[0] - level)) for curve in curves]
    return [(record, step) for record, (_, step) in zip(scored, nearest, strict=True)]


def variant_curves(
    record: RunRecord, base: Evaluation | None
) -> list[tuple[str, list[Evaluation]]]:
    """Return names and curves: each schedule over steps, and each scale at the last step."""
    own = [one for one in record.evaluations if one.step and one.reward is not None]
    others = [one for one in record.variants if one.step and one.reward is not None]
    start = [base] if base is not None and base.reward is not None else []
    curves = []
    for schedule in dict.fromkeys(one.variant.schedule for one in others):
        points = [one for one in others if one.variant == Variant(schedule)]
        if points:
            curves.append((f"schedule {schedule}", [*start, *points]))
    last = max((one.step for one in others), default=0)
    ends = [one for one in (*own, *others) if one.step == last]
    for kept in dict.fromkeys(replace(one.variant, lora_scale=1.0) for one in ends):
        points = [one for one in ends if replace(one.variant, lora_scale=1.0) == kept]
        points.sort(key=lambda one: one.variant.lora_scale)
        if len(points) > 1:
            first = start if kept.guidance_scale is None else []
            curves.append((f"LoRA scales {kept.name}".strip(), [*first, *points]))
    for kept in dict.fromkeys(replace(one.variant, guidance_scale=None) for one in ends):
        points = [one for one in ends if replace(one.variant, guidance_scale=None) == kept]
        points.sort(key=guidance_of)
        if len(points) > 1:
            curves.append((f"guidance scales {kept.name}".strip(), points))
    return curves


def guidance_of(one: Evaluation) -> float:
    """Return the guidance scale of an evaluation."""
    own = one.variant.guidance_scale
    return one.settings["sampler"]["guidance_scale"] if own is None else own


def from_base(record: RunRecord, base: Evaluation | None) -> list[Evaluation]:
    """Return a run's evaluations, preceded by that of the base model."""
    tuned = [one for one in record.evaluations if one.step]
    return [base, *tuned] if base is not None else tuned
