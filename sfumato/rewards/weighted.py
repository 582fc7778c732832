"""The weighted sum of rewards: value = sum_i weight_i * reward_i."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.rewards.reward import Reward, Score


@dataclass(frozen=True)
class WeightedPart:
    """Give a reward a name, under which its own value is reported, and a weight."""

    name: str
    reward: Reward
    weight: float


@final
class WeightedSum(Reward):
    """Score the weighted sum of several rewards, and report each by name.

    Attributes:
        differentiable: whether every part is.
        scale: sum of |weight| * scale of the parts, that is, how far the value can move when every
            raw score moves by one.
    """

    def __init__(self, parts: Sequence[WeightedPart]) -> None:
        """Sum `parts`.

        Raises:
            ValueError: if there are no parts, two have the same name, or a weight is not finite.
        """
        super().__init__()
        if not parts:
            raise ValueError("a weighted sum of no rewards; name at least one part")
        for name, count in Counter(part.name for part in parts).items():
            if count > 1:
                raise ValueError(f"{count} rewards are named {name!r}; give each its own name")
        for part in parts:
            if not math.isfinite(part.weight):
                raise ValueError(
                    f"the weight of reward {part.name!r} is {part.weight}; give a finite number"
                )
        self.names = [part.name for part in parts]
        self.weights = [part.weight for part in parts]
        self.rewards = nn.ModuleList([part.reward for part in parts])
        self.differentiable = all(part.reward.differentiable for part in parts)
        self.scale = sum(abs(part.weight) * part.reward.scale for part in parts)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return the weighted sum, and as parts each reward's own value, detached."""
        values = [reward(images, prompts) for reward in self.rewards]
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        parts = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        return Score(torch.stack(weighted).sum(0), parts)
