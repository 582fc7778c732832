"""Scores of decoded latents, and the reward's gradient at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.models.model import Images, Latents, TextToImageModel
from sfumato.objectives.balance import PART, Balance
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
        self.balance = Balance(reward)
        if self.needs_gradient and reward.standardise:
            self.why_idle = "it measures the deviations of the reward's parts (reward.standardise)"
        self._clip_quantile = clip_quantile
        self._limit: float | None = None

    def scored(
        self, model: TextToImageModel, x0: Latents, prompts: Sequence[str], *, clamp: bool
    ) -> Score:
        """Score latents; the gradient of the value at x0 is balanced as the reward asks."""
        return self.balance(self.reward.score(decoded(model, x0, clamp=clamp), prompts), x0)

    def reward_gradient(
        self, model: TextToImageModel, x0: Latents, prompts: Sequence[str], *, clamp: bool
    ) -> "Scored":
        """Score latents and differentiate each score by its latents; no graph is left."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            score = self.scored(model, x0, prompts, clamp=clamp)
            (gradient,) = torch.autograd.grad(score.value.sum(), x0)
        parts = {name: part.detach() for name, part in score.parts.items()}
        return Scored(Score(score.value.detach(), parts, measures=score.measures), gradient)

    def observe(self, rows: Mapping[str, Sequence[float]]) -> None:
        """Learn the parts' deviations; move the limit towards the quantile of all other numbers."""
        blind = self.balance.is_blind  # then the other numbers are 0
        self.balance.observe({name: rows[name] for name in rows if name.startswith(PART)})
        others = [v for name in rows if not name.startswith(PART) for v in rows[name]]
        if self._clip_quantile is None or blind:
            return
        values = torch.tensor(others, dtype=torch.float64)
        quantile = float(values.quantile(self._clip_quantile))
        before = quantile if self._limit is None else self._limit
        self._limit = MEMORY * before + (1 - MEMORY) * quantile

    def state(self) -> dict[str, Any]:
        limit = {} if self._limit is None else {"limit": self._limit}
        return limit | self.balance.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._limit = state.get("limit")
        self.balance.restore(state)


def decoded(model: TextToImageModel, x0: Latents, *, clamp: bool) -> Images:
    """Return images for a reward; clamped to [0, 1], saturated pixels carry no gradient."""
    images = model.decode(x0)
    return images.clamp(0, 1) if clamp else images


def score_metrics(scores: Sequence[Score]) -> dict[str, Float[Tensor, ""]]:
    """Return the means of a reward, its parts and measures, over several batches of images."""
    metrics = {"reward": torch.stack([score.value for score in scores]).mean()}
    metrics |= {
        f"reward/{name}": torch.stack([score.parts[name] for score in scores]).mean()
        for name in scores[0].parts
    }
    return metrics | {
        name: torch.stack([score.measures[name] for score in scores]).mean()
        for name in scores[0].measures
    }


@dataclass(frozen=True)
class Scored:
    """Rewards of a batch, and the gradient of each at its own latents."""

    score: Score
    gradient: Float[Tensor, "b *d"]
