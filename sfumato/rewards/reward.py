"""Contract of a reward: a score per image and prompt, differentiable or not."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """A batch of rewards and, for a composed reward, its parts by name (detached, unweighted)."""

    value: Float[Tensor, " b"]
    parts: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)


class Reward(nn.Module, abc.ABC):
    """Score images against their prompts; higher is better.

    Attributes:
        differentiable: whether gradients flow from the score back to the images.
        scale: what the raw score (a cosine, a mean of pixels) is multiplied by. `kl_coeff` is
            calibrated to it, so it is recorded with every run.
        weights: of the parts of a composed reward, by name.
    """

    differentiable: bool = True
    scale: float = 1.0
    weights: Mapping[str, float] = MappingProxyType({})

    @abc.abstractmethod
    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images in [0, 1] row by row against `prompts`, a list of the same length."""

    def forward(
        self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """Return only the value of `score`."""
        return self.score(images, prompts).value
