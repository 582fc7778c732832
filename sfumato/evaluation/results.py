"""What evaluation found: read back from run folders, and two runs compared at equal reward."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.training.folder import RunFolder

SUMMARY = "summary.json"
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint scored; step 0 is the base model.

    Attributes:
        reward: mean over images; None where nothing scored them.
        reward_error: standard error of `reward` over noise, the prompts held fixed.
        diversity: mean over prompts of what `diversity_label` names.
        held_out: mean of each score that was not trained on.
    """

    step: int
    reward: float | None
    reward_error: float | None
    diversity: float
    diversity_label: str
    held_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EqualReward:
    """The diversity of two runs where their training curves pass the same rewards.

    Attributes:
        mean_difference: mean over `levels` of other minus baseline.
    """

    levels: tuple[float, ...]
    baseline_diversity: tuple[float, ...]
    other_diversity: tuple[float, ...]
    mean_difference: float


def read_evaluations(run: RunFolder) -> list[Evaluation]:
    """Return what was evaluated in a run folder, in the order of steps.

    Raises:
        ValueError: if a summary cannot be read.
    """
    found = []
    for place in sorted((run.path / "evaluation").glob("step-*")):
        summary = read_summary(place)
        diversity = summary["diversity"]
        found.append(
            Evaluation(
                step=summary["step"],
                reward=summary.get("reward"),
                reward_error=summary.get("reward_error"),
                diversity=diversity["mean"],
                diversity_label=diversity["label"],
                held_out=summary["held_out"],
            )
        )
    return found


def read_summary(place: Path) -> dict[str, Any]:
    """Return summary.json of one evaluated step.

    Raises:
        ValueError: if it is missing, not JSON, or lacks a key.
    """
    file = place / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"step", "diversity", "held_out", "settings"}
        if summary.get("settings", {}).get("reward", "of an older version") is not None:
            wanted |= {"reward", "reward_error"}
        if missing := wanted - summary.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove {place} and evaluate again"
        ) from error
    return summary


def at_equal_reward(
    baseline: Sequence[Evaluation], other: Sequence[Evaluation], *, num_levels: int = 10
) -> EqualReward | None:
    """Compare the diversity of two runs at rewards that both of them reach.

    The levels are evenly spaced: from above the reward that both curves start from (the higher of
    the two starts) up to the highest that both reach. At a level, a curve is read where it gets
    there first in the order of steps, linearly in reward between two evaluated steps; what a curve
    does after that, falling back included, is left out, and so are steps that nothing scored.

    Returns:
        None if there is no such level.

    Raises:
        ValueError: if the two measured diversity differently.
    """
    labels = {evaluation.diversity_label for evaluation in (*baseline, *other)}
    if len(labels) > 1:
        raise ValueError(
            f"diversity was measured as {' and as '.join(sorted(labels))}; evaluate both runs with "
            "the same features"
        )
    curves = [_points(baseline), _points(other)]
    if not all(curves):
        return None
    low = max(curve[0].reward for curve in curves)
    high = min(max(point.reward for point in curve) for curve in curves)
    if high <= low:
        return None
    inner = (low + (high - low) * k / num_levels for k in range(1, num_levels))
    levels = (*inner, high)
    first, second = (tuple(_diversity_at(curve, level) for level in levels) for curve in curves)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return EqualReward(levels, first, second, sum(differences) / len(differences))


@dataclass(frozen=True)
class _Point:
    reward: float
    diversity: float


def _points(curve: Sequence[Evaluation]) -> list[_Point]:
    ordered = sorted(curve, key=lambda one: one.step)
    return [_Point(one.reward, one.diversity) for one in ordered if one.reward is not None]


def _diversity_at(curve: Sequence[_Point], level: float) -> float:
    """Return the diversity where a curve that starts below a level reaches it first."""
    for before, after in itertools.pairwise(curve):
        if after.reward >= level:
            share = (level - before.reward) / (after.reward - before.reward)
            return before.diversity + share * (after.diversity - before.diversity)
    raise AssertionError(f"the curve does not reach {level}")
