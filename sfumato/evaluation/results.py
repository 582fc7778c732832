"""Results of evaluations, read from run folders, and the diversity of two runs at equal reward."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.files import read_object, write_text
from sfumato.records import Count, Finite, read_record
from sfumato.training.checkpoint import list_checkpoints
from sfumato.training.folder import RunFolder, step_name

SUMMARY = "summary.json"
SCORES = "scores.jsonl"
LAYOUTS = "layouts"  # folders of the same pictures, for scorers of benchmarks
OLDER = (SUMMARY, SUMMARY, SCORES, "images/[0-9]*-[0-9]*.png")  # see files.new_folder


@dataclass(frozen=True)
class Variant:
    """How images of a checkpoint are made; the default is the trained model alone.

    Attributes:
        schedule: annealed importance guidance; see `annealed_weights`.
        lora_scale: factor of what the adapter adds.
        guidance_scale: of classifier-free guidance; None is the run's own.
    """

    schedule: str = "draft"
    lora_scale: Finite = 1.0
    guidance_scale: Finite | None = None

    @property
    def name(self) -> str:
        """Return the name of its folder in run/evaluation; "" is that folder itself."""
        own = [(key, value) for key, value in vars(self).items() if value != vars(Variant())[key]]
        return ",".join(
            f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"
            for key, value in own
        )


@dataclass(frozen=True)
class Metric:
    """A number of a set of images.

    Attributes:
        manifest: what it depends on beside the images: network, reference.
    """

    value: Finite
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """Return the type of the network, such as clip or dinov2."""
        return str(self.manifest.get("network", {}).get("kind"))


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint; step 0 is the base model.

    Attributes:
        reward: mean over images; None without a reward.
        reward_error: standard error of `reward` over noise, with the prompts held fixed.
        diversity: mean over prompts of the distance that `diversity_label` names.
        held_out: mean of each score that was not trained on.
        settings: the settings that the numbers depend on.
        checkpoint: fingerprint of the checkpoint; None for the base model.
        variant: how the images were made.
        metrics: numbers of the whole set of images, by their names.
        folder: where all of it lies.
    """

    step: int
    reward: float | None
    reward_error: float | None
    diversity: float
    diversity_label: str
    held_out: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    checkpoint: str | None = field(default=None, compare=False)
    variant: Variant = Variant()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    def manifest(self, metric: str) -> dict[str, Any]:
        """Return all that a metric's number depends on, the checkpoint and the variant aside."""
        return {**self.settings, "metric": self.metrics[metric].manifest}


@dataclass(frozen=True)
class EqualReward:
    """Diversity of two runs at the reward levels that both of their curves pass.

    Attributes:
        mean_difference: mean over `levels` of other minus baseline.
    """

    levels: tuple[float, ...]
    baseline_diversity: tuple[float, ...]
    other_diversity: tuple[float, ...]
    mean_difference: float


@dataclass(frozen=True)
class _Diversity:
    label: str
    mean: Finite


@dataclass(frozen=True)
class _Summary:
    """summary.json of one evaluated step."""

    step: Count
    diversity: _Diversity
    held_out: dict[str, Finite]
    settings: dict[str, Any]
    reward: Finite | None = None
    reward_error: Finite | None = None
    checkpoint: str | None = None
    variant: Variant = Variant()
    metrics: dict[str, Metric] = field(default_factory=dict)


def read_evaluations(run: RunFolder, variant: Variant = Variant()) -> list[Evaluation]:
    """Return the evaluations of a variant in a run folder, in the order of steps.

    Raises:
        ValueError: if a summary cannot be read.
    """
    return list(map(read_evaluation, list_checkpoints(run.evaluation(0, variant.name).parent)))


def read_variants(run: RunFolder) -> list[list[Evaluation]]:
    """Return the evaluations of each variant but the default one, in the order of their names.

    Raises:
        ValueError: if a summary cannot be read.
    """
    root = run.evaluation(0).parent
    folders = sorted(path for path in root.glob("[!.]*") if path not in list_checkpoints(root))
    found = [list(map(read_evaluation, list_checkpoints(path))) for path in folders]
    return [one for one in found if one]


def read_evaluation(folder: Path) -> Evaluation:
    """Return the evaluation of one step.

    Raises:
        ValueError: if summary.json is missing or damaged.
    """
    path, advice = folder / SUMMARY, f"remove {folder} and evaluate again"
    one = read_record(path, _Summary, advice)
    # Older versions wrote no reward settings, but always a reward.
    has_reward = one.settings.get("reward", "of an older version") is not None
    scores = (one.reward, one.reward_error)
    if None in scores and (has_reward or scores != (None, None)):
        raise ValueError(f"{path} is damaged: reward or reward_error is missing; {advice}")
    if folder.name != step_name(one.step):
        raise ValueError(f"{path} is damaged: step = {one.step}; {advice}")
    if one.variant.name not in ("", folder.parent.name):
        raise ValueError(f"{path} is damaged: variant = {one.variant.name}; {advice}")
    return Evaluation(
        one.step,
        one.reward,
        one.reward_error,
        one.diversity.mean,
        one.diversity.label,
        one.held_out,
        one.settings,
        one.checkpoint,
        one.variant,
        one.metrics,
        folder,
    )


def add_metrics(folder: Path, metrics: Mapping[str, Metric]) -> None:
    """Write metrics beside the other numbers of an evaluated step.

    Raises:
        ValueError: summary.json cannot be read or written.
    """
    summary = read_object(folder / SUMMARY, f"remove {folder} and evaluate again")
    new = {name: asdict(metric) for name, metric in metrics.items()}
    summary["metrics"] = {**summary.get("metrics", {}), **new}
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def at_equal_reward(
    baseline: Sequence[Evaluation], other: Sequence[Evaluation], *, num_levels: int = 10
) -> EqualReward | None:
    """Compare the diversity of two runs at rewards that both of them reach.

    The levels are evenly spaced between two rewards: the higher of the two starts (excluded) and
    the highest reward that both curves reach (included). At each level a curve is read where it
    first reaches that level in the order of steps, by linear interpolation in reward between two
    evaluated steps. Later points of the curve do not count, nor do steps without a reward.

    Returns:
        None if there is no such level.

    Raises:
        ValueError: if the two runs measured diversity differently.
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
    low = max(curve[0][0] for curve in curves)
    high = min(max(reward for reward, _ in curve) for curve in curves)
    if high <= low:
        return None
    inner = (low + (high - low) * k / num_levels for k in range(1, num_levels))
    levels = (*inner, high)
    first, second = (tuple(_diversity_at(curve, level) for level in levels) for curve in curves)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return EqualReward(levels, first, second, sum(differences) / len(differences))


def _points(curve: Sequence[Evaluation]) -> list[tuple[float, float]]:
    ordered = sorted(curve, key=lambda one: one.step)
    return [(one.reward, one.diversity) for one in ordered if one.reward is not None]


def _diversity_at(curve: Sequence[tuple[float, float]], level: float) -> float:
    """Return the diversity where a curve that starts below a level first reaches it."""
    for (low, before), (high, after) in itertools.pairwise(curve):
        if high >= level:
            return before + (level - low) / (high - low) * (after - before)
    raise AssertionError(f"the curve does not reach {level}")
