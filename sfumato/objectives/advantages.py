"""Advantages: how much better each image is than others of its prompt.

    A_i = sum_k w_k clip((r_ik - mean_k) / deviation_k, -c, c) / sum_k |w_k|      over rewards k

Mean and deviation are of the image's group (Flow-GRPO, arXiv 2505.05470), or of the last rewards of
its prompt (DDPO, arXiv 2305.13301, appendix D); the deviation may be of all images (DiffusionNFT).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfumato.config import CollectedConfig

KEPT, LEAST = 16, 16  # rewards of a prompt that are kept, and that its own statistics need
PROMPTS = 10_000  # whose rewards are kept
ROUNDING = 1e-6  # of the mean: a smaller deviation is none
EQUAL = 1e-4  # an advantage that tells nothing


@dataclass(frozen=True)
class Judged:
    """Advantages of images, and which of them tell nothing.

    Attributes:
        kept: rows whose rewards are all finite; the others have advantage 0.
        idle: share of groups without a signal, such as those whose rewards are equal.
    """

    values: Float[Tensor, " n"]
    kept: Bool[Tensor, " n"]
    idle: float


@final
class Judge:
    """Turns rewards into advantages; it remembers rewards of prompts where the settings say so."""

    def __init__(self, config: CollectedConfig) -> None:
        self._config = config
        self.history: OrderedDict[str, dict[str, list[float]]] = OrderedDict()

    def __call__(
        self,
        prompts: Sequence[str],
        rewards: Mapping[str, Sequence[float]],
        weights: Mapping[str, float],
    ) -> Judged:
        """Judge rows whose groups lie next to each other; NaN is a reward that is missing.

        Args:
            rewards: of each row, by the name of the reward.
            weights: of the rewards, by name.
        """
        table = {name: torch.tensor(values).double() for name, values in rewards.items()}
        kept = torch.stack([values.isfinite() for values in table.values()]).all(0)
        total = torch.zeros(len(prompts), dtype=torch.float64)
        for name, weight in weights.items():
            values, bound = table[name], self._config.advantage_clip
            mean, deviation = self._statistics(name, prompts, values, kept)
            told = deviation > ROUNDING * mean.abs()
            found = torch.where(told & kept, (values - mean) / deviation, 0.0)
            total += weight * found.clamp(-bound, bound)
        total /= sum(abs(weight) for weight in weights.values())
        idle = (total.abs() < EQUAL).reshape(-1, self._config.images_per_prompt).all(1)
        return Judged(total.float(), kept, idle.double().mean().item())

    def _statistics(
        self, name: str, prompts: Sequence[str], values: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and deviation that each row is compared with."""
        if self._config.statistics == "group":
            mean, deviation = self._of_groups(values, kept)
        else:
            mean, deviation = self._of_prompts(name, prompts, values, kept)
        if self._config.deviation == "batch":
            deviation = values[kept].std(correction=0).expand(len(values))
        return mean, deviation

    def _of_groups(self, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        size = self._config.images_per_prompt
        rows, there = values.nan_to_num(0, 0, 0).reshape(-1, size), kept.reshape(-1, size)
        count = there.sum(1, keepdim=True).clamp(min=1)
        mean = (rows * there).sum(1, keepdim=True) / count
        variance = ((rows - mean).square() * there).sum(1, keepdim=True) / count
        return (
            mean.expand(-1, size).flatten(),
            variance.sqrt().expand(-1, size).flatten(),
        )

    def _of_prompts(
        self, name: str, prompts: Sequence[str], values: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Remember the rewards, and compare each with the last of its prompt; else with all."""
        for prompt, value, there in zip(prompts, values.tolist(), kept.tolist(), strict=True):
            if there:
                last = self.history.setdefault(prompt, {}).setdefault(name, [])
                last.append(value)
                del last[:-KEPT]
                self.history.move_to_end(prompt)
        good = values[kept]
        whole = (good.mean().item(), good.std(correction=0).item())
        known: dict[str, tuple[float, float]] = {}
        for prompt in set(prompts):
            last = self.history.get(prompt, {}).get(name, [])
            own = torch.tensor(last).double()
            few = len(last) < LEAST
            known[prompt] = whole if few else (own.mean().item(), own.std(correction=0).item())
        while len(self.history) > PROMPTS:
            self.history.popitem(last=False)
        mean, deviation = zip(*(known[prompt] for prompt in prompts), strict=True)
        return torch.tensor(mean).double(), torch.tensor(deviation).double()
