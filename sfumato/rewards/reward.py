"""Contract of a reward: a score per image and prompt, differentiable or not."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

PromptRows = Callable[[], Mapping[str, Mapping[str, Any]]]  # reads the row of each prompt's table


class ScorerError(ValueError):
    """A scorer that cannot be asked, or does not keep to what it owes: no row can be scored."""


@dataclass(frozen=True)
class Score:
    """A batch of rewards and, for a composed reward, its parts by name (detached, unweighted).

    Attributes:
        terms: the parts with their graphs, of a reward that asks for a balance of them.
        measures: numbers about the parts' gradients, by the names of their metrics.
    """

    value: Float[Tensor, " b"]
    parts: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)
    terms: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)
    measures: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


class Reward(nn.Module, abc.ABC):
    """Score images against their prompts; higher is better.

    Attributes:
        differentiable: whether gradients flow from the score back to the images.
        scale: what the raw score (a cosine, a mean of pixels) is multiplied by. `kl_coeff` is
            calibrated to it, so it is recorded with every run.
        crop: smallest share of each side that random crops of images with a gradient keep.
        weights: of the parts of a composed reward, by name.
        standardise: whether who learns from gradients divides each part by its running deviation.
        gradients: whether the parts' gradients at x0 are summed, measured too, or equalised.
        title: what messages call it.
        why_constant: why there is no gradient, where that was found out.
    """

    differentiable: bool = True
    scale: float = 1.0
    crop: float = 1.0
    weights: Mapping[str, float] = MappingProxyType({})
    standardise: bool = False
    gradients: str = "summed"
    title: str = ""
    why_constant: str = ""

    def prepare(self, rows: PromptRows) -> None:
        """Get ready to score, once, on the device of the weights; most rewards are.

        Args:
            rows: reads what the prompt tables have beside each prompt; equal prompts share a row.
        """

    @abc.abstractmethod
    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images in [0, 1] row by row against `prompts`, a list of the same length."""

    def forward(
        self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """Return only the value of `score`."""
        return self.score(images, prompts).value


@contextmanager
def whole_images(reward: Reward) -> Iterator[None]:
    """Let a reward and its parts see images whole, also where they crop in training."""
    cropping = [(each, each.crop) for each in reward.modules() if isinstance(each, Reward)]
    for each, _ in cropping:
        each.crop = 1.0
    try:
        yield
    finally:
        for each, crop in cropping:
            each.crop = crop


class LearningReward(abc.ABC):
    """A reward whose weights are trained: what an objective knows of it."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where images are scored."""

    @abc.abstractmethod
    def compare(
        self, images: Float[Tensor, "_ 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, "n b"]:
        """Score n stacked batches of images in [0, 1], each row by row against the prompts.

        The scores have a gradient to everything that is trained.
        """


def score_rows(
    reward: Reward,
    images: Float[Tensor, "b 3 h w"],
    prompts: Sequence[str],
    faults: list[Exception],
) -> list[dict[str, float]]:
    """Return value and parts of each image's reward, by name; nothing where the reward fails.

    Args:
        faults: gets what the reward raised, or a ValueError where it has not one number an image.

    Raises:
        ScorerError: if the reward raised it, as no row can be scored then.
    """
    try:
        score = reward.score(images, prompts)
    except ScorerError:
        raise
    except Exception as error:  # noqa: BLE001 -- a reward may be anybody's code
        faults.append(error)
        if len(prompts) == 1:
            return [{}]
        each = zip(images.split(1), prompts, strict=True)
        return [
            row for image, prompt in each for row in score_rows(reward, image, [prompt], faults)
        ]
    columns = {"reward": score.value, **score.parts}
    for name, column in columns.items():
        if (shape := list(column.shape)) != [len(prompts)]:
            fault = f"{name} has shape {shape} for {len(prompts)} images, not one number for each"
            faults.append(ValueError(fault))
            return [{} for _ in prompts]
    values = {name: column.double().tolist() for name, column in columns.items()}
    return [{name: values[name][i] for name in values} for i in range(len(prompts))]
