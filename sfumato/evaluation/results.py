"""Results of evaluations, read from run folders, and the diversity of two runs at equal reward."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.evaluation.bootstrap import LEVEL, interval
from sfumato.evaluation.manifest import check_alike
from sfumato.files import read_object, write_text
from sfumato.records import Count, Finite, read_record, read_rows
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
        network = self.manifest.get("network")
        return str(network.get("kind")) if isinstance(network, Mapping) else str(None)


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
        per_prompt: diversity of each prompt; older versions wrote none.
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
    per_prompt: Sequence[float] = field(default=(), compare=False)
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
    per_prompt: list[Finite] = field(default_factory=list)


@dataclass(frozen=True)
class _Scored:
    """What is read of a row of scores.jsonl."""

    prompt_index: Count
    reward: Finite


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
        one.diversity.per_prompt,
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
        ValueError: if the two runs were evaluated differently.
    """
    curves = _scored(baseline, other)
    if min(map(len, curves)) < 2:
        return None
    points = [_points(curve) for curve in curves]
    levels, first, second = (each[0] for each in _at_levels(points, num_levels))
    if levels.isnan().any():
        return None
    difference = (second - first).mean().item()
    found = [tuple(each.tolist()) for each in (levels, first, second)]
    return EqualReward(found[0], found[1], found[2], difference)


def equal_reward_interval(
    baseline: Sequence[Evaluation],
    other: Sequence[Evaluation],
    *,
    num_levels: int = 10,
    level: float = LEVEL,
) -> tuple[float, float, float] | None:
    """Return the mean difference of `at_equal_reward`, and the ends of its interval over prompts.

    Each draw of prompts, with all their images, makes both curves anew; see `bootstrap`.

    Args:
        baseline, other: as read from run folders.
        level: share of intervals that cover the difference over all prompts like these.

    Returns:
        None if there is no level that both curves pass.

    Raises:
        ValueError: as `at_equal_reward`, or there are too few prompts, or a file is damaged.
    """
    if at_equal_reward(baseline, other, num_levels=num_levels) is None:
        return None
    curves = _scored(baseline, other)
    columns = [column for curve in curves for one in curve for column in _by_prompt(one)]

    def difference(means: Float[Tensor, "b m"]) -> Float[Tensor, " b"]:
        points = means.unflatten(1, (-1, 2)).split([len(curve) for curve in curves], 1)
        _, first, second = _at_levels(points, num_levels)
        return (second - first).mean(1)

    return interval(difference, torch.tensor(columns, dtype=torch.float64).T, level=level)


def _scored(*curves: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Return the evaluations that have a reward, in the order of steps; refuse unlike ones."""
    scored = [sorted((o for o in c if o.reward is not None), key=lambda o: o.step) for c in curves]
    labels = {evaluation.diversity_label for curve in curves for evaluation in curve}
    if len(labels) > 1:
        raise ValueError(
            f"diversity was measured as {' and as '.join(sorted(labels))}; evaluate both runs with "
            "the same features"
        )
    first, *others = [one for curve in scored for one in curve] or [None]
    for one in others:
        assert first is not None and one is not None
        names = f"step {first.step} of one run", f"step {one.step} of another"
        check_alike(*names, first.settings, one.settings)
    return scored


def _points(curve: Sequence[Evaluation]) -> Float[Tensor, "1 p 2"]:
    points = [(one.reward, one.diversity) for one in curve]
    return torch.tensor([points], dtype=torch.float64)


def _by_prompt(one: Evaluation) -> tuple[list[float], list[float]]:
    """Return the mean reward and the diversity of each prompt."""
    assert one.folder is not None
    advice = f"remove {one.folder} and evaluate again"
    rewards: list[list[float]] = [[] for _ in one.per_prompt]
    for row in read_rows(one.folder / SCORES, _Scored, advice):
        if row.prompt_index < len(rewards):
            rewards[row.prompt_index].append(row.reward)
    if not all(rewards):
        raise ValueError(f"{one.folder / SCORES} lacks rows of a prompt; {advice}")
    return [sum(each) / len(each) for each in rewards], list(one.per_prompt)


def _at_levels(
    points: Sequence[Float[Tensor, "b _ 2"]], num_levels: int
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """Return levels of reward and the diversity of two curves there; NaN where there are none.

    Args:
        points: reward and diversity of both, in the order of steps; b such pairs of curves.
    """
    rewards = [curve[..., 0] for curve in points]
    low = torch.maximum(*(reward[:, 0] for reward in rewards))[:, None]
    high = torch.minimum(*(reward.amax(1) for reward in rewards))[:, None]
    levels = low + (high - low) * torch.arange(1, num_levels) / num_levels
    levels = torch.where(high > low, torch.cat([levels, high], 1), torch.nan)
    first, second = (_diversity_at(curve, levels) for curve in points)
    return levels, first, second


def _diversity_at(
    curve: Float[Tensor, "b p 2"], levels: Float[Tensor, "b n"]
) -> Float[Tensor, "b n"]:
    """Return the diversity where curves that start below a level first reach it."""
    reached = curve[:, None, 1:, 0] >= levels[..., None]
    before = reached.int().argmax(2)[..., None].expand(-1, -1, 2)
    start, end = curve.gather(1, before), curve.gather(1, before + 1)
    share = (levels - start[..., 0]) / (end[..., 0] - start[..., 0])
    return start[..., 1] + share * (end[..., 1] - start[..., 1])
