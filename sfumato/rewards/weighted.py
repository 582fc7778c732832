"""The weighted sum of rewards: value = sum_i weight_i * reward_i."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.rewards.reward import PromptRows, Reward, Score


@final
class WeightedSum(Reward):
    """Score the weighted sum of several rewards, and report each by name.

    The score is always the plain sum. Objectives that learn from its gradient balance the parts as
    `standardise` and `gradients` say; see objectives/balance.py.

    Attributes:
        differentiable: whether every part is.
        scale: sum of |weight| * scale of the parts, that is, how far the value can move when every
            raw score moves by one.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[float, Reward]],
        *,
        standardise: bool = False,
        gradients: str = "summed",
    ) -> None:
        """Sum `parts`: by name, a weight and a reward.

        Raises:
            ValueError: if there are no parts, a weight is not finite, or a part is named reward.
        """
        super().__init__()
        if not parts:
            raise ValueError("a weighted sum of no rewards; name at least one part")
        for name, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight}; give a finite number")
        if "reward" in parts:
            raise ValueError("a part is named 'reward', as the sum is; give it another name")
        self.weights = {name: weight for name, (weight, _) in parts.items()}
        self.rewards = nn.ModuleList([reward for _, reward in parts.values()])
        self.differentiable = all(reward.differentiable for _, reward in parts.values())
        self.scale = sum(abs(weight) * reward.scale for weight, reward in parts.values())
        self.standardise, self.gradients = standardise, gradients

    def prepare(self, rows: PromptRows) -> None:
        """Prepare each part, and learn from each whether it is differentiable."""
        rewards: list[Any] = [*self.rewards]
        for reward in rewards:
            reward.prepare(rows)
        weights = self.weights.values()
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.why_constant = "; ".join(r.why_constant for r in rewards if not r.differentiable)
        self.scale = sum(abs(w) * reward.scale for w, reward in zip(weights, rewards, strict=True))

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return the weighted sum, and as parts each reward's own value, detached."""
        values = [reward(images, prompts) for reward in self.rewards]
        pairs = list(zip(self.weights.values(), values, strict=True))
        pairs = [(weight, value) for weight, value in pairs if weight] or pairs  # NaN x 0 is NaN
        terms = dict(zip(self.weights, values, strict=True))
        parts = {name: value.detach() for name, value in terms.items()}
        total = torch.stack([weight * value for weight, value in pairs]).sum(0)
        balanced = self.standardise or self.gradients != "summed"
        return Score(total, parts, terms if balanced else {})
