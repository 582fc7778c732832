"""Scores of decoded latents, and the reward's gradient at them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.models.model import Images, Latents, TextToImageModel
from sfumato.objectives.objective import Batch, Objective
from sfumato.rewards.reward import Reward, Score


class RewardedObjective(Objective[Batch]):
    """An objective that learns from a reward.

    Args:
        reward: frozen.

    Attributes:
        needs_gradient: whether it learns from the reward's gradient with respect to the images.

    Raises:
        ValueError: if it needs a gradient, and the reward is not differentiable.
    """

    needs_gradient: bool = True

    def __init__(self, sampler: SamplerConfig, reward: Reward) -> None:
        if self.needs_gradient and not reward.differentiable:
            raise ValueError(
                f"the reward {type(reward).__name__} is not differentiable, and the objective "
                "learns from its gradient; choose a differentiable one (reward=clip, "
                "reward=color), or an objective that needs no gradient "
                "(objective=policy_gradient, nft or awm)"
            )
        self.sampler = sampler
        self.reward = reward


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
