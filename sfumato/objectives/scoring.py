"""Scores of decoded latents, and the reward's gradient at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.models.model import Images, Latents, TextToImageModel
from sfumato.objectives.objective import Batch, Objective
from sfumato.rewards.reward import Reward, Score

MEMORY = 0.9  # of the running quantile


class RewardedObjective(Objective[Batch]):
    """An objective that learns from a reward.

    Args:
        reward: frozen.
        clip_quantile: of the rows of a step; their running quantile is the limit of what it clips.

    Attributes:
        needs_gradient: whether it learns from the reward's gradient with respect to the images.

    Raises:
        ValueError: if it needs a gradient, and the reward is not differentiable.
    """

    needs_gradient: bool = True

    def __init__(
        self, sampler: SamplerConfig, reward: Reward, clip_quantile: float | None = None
    ) -> None:
        if self.needs_gradient and not reward.differentiable:
            why = f" ({reward.why_constant})" if reward.why_constant else ""
            raise ValueError(
                f"the reward {reward.title or type(reward).__name__} is not differentiable{why}, "
                "and the objective learns from its gradient; choose a differentiable one "
                "(reward=clip, reward=color), or an objective that needs no gradient "
                "(objective=policy_gradient, nft or awm)"
            )
        self.sampler = sampler
        self.reward = reward
        self._clip_quantile = clip_quantile
        self._limit: float | None = None

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Move the limit towards the quantile of all these numbers."""
        if self._clip_quantile is None:
            return
        values = torch.tensor([v for each in rows.values() for v in each], dtype=torch.float64)
        quantile = float(values.quantile(self._clip_quantile))
        before = quantile if self._limit is None else self._limit
        self._limit = MEMORY * before + (1 - MEMORY) * quantile

    def state(self) -> dict[str, Any]:
        return {} if self._limit is None else {"limit": self._limit}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._limit = state.get("limit")


def decoded(model: TextToImageModel, x0: Latents, *, clamp: bool) -> Images:
    """Return images for a reward; clamped to [0, 1], saturated pixels carry no gradient."""
    images = model.decode(x0)
    return images.clamp(0, 1) if clamp else images


def score_metrics(scores: Sequence[Score]) -> dict[str, Float[Tensor, ""]]:
    """Return the means of a reward and of its parts, over several batches of images."""
    metrics = {"reward": torch.stack([score.value for score in scores]).mean()}
    return metrics | {
        f"reward/{name}": torch.stack([score.parts[name] for score in scores]).mean()
        for name in scores[0].parts
    }


@dataclass(frozen=True)
class Scored:
    """Rewards of a batch, and the gradient of each at its own latents."""

    score: Score
    gradient: Float[Tensor, "b *d"]


def reward_gradient(
    model: TextToImageModel, reward: Reward, x0: Latents, prompts: Sequence[str], *, clamp: bool
) -> Scored:
    """Score latents and differentiate each score by its latents; no graph is left."""
    with torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        score = reward.score(decoded(model, x0, clamp=clamp), prompts)
        (gradient,) = torch.autograd.grad(score.value.sum(), x0)
    parts = {name: part.detach() for name, part in score.parts.items()}
    return Scored(Score(score.value.detach(), parts), gradient)
