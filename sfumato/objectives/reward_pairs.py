"""Training of a reward on pairs: it learns to score the preferred image of a caption higher.

    loss = mean over pairs of KL((y, 1 - y) || softmax(r_0, r_1))

y is the probability that image 0 is preferred, 1/2 for a tie, and r the rewards of both images. It
is the cross-entropy of the labels without their own entropy, which no weight changes: a tie that
is scored as one costs nothing.

Source: PickScore, arXiv 2305.01569, eq. 2, without weights of prompts.
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from sfumato.data.sample import Preference, Sample
from sfumato.diffusion.randomness import Rng
from sfumato.objectives.objective import Loss, ObjectiveOf
from sfumato.rewards.reward import LearningReward


@final
class RewardPairs(ObjectiveOf[LearningReward, Sequence[Preference]]):
    """Learn a reward from preferences; a batch is a list of pairs of one size."""

    needs_reference = False
    why_idle = "the reward scores both pictures of each pair alike"

    def loss(self, model: LearningReward, batch: Sequence[Preference], rng: Rng) -> Loss:
        rows = _compare(model, batch)
        value, right = rows["loss"].mean(), rows["accuracy"]
        untied = ~right.isnan()
        metrics = {"loss": value.detach(), "margin": rows["margin"].detach().mean()}
        counted = torch.stack([right.nan_to_num(0).sum(), untied.sum()])
        return Loss(value, metrics, partial={"accuracy": counted})

    @torch.no_grad()
    def stable_metrics(
        self,
        model: LearningReward,
        batch: Sequence[Preference],
        positions: Sequence[int],
        seed: int,
    ) -> Mapping[str, Float[Tensor, " b"]]:
        """Return loss, accuracy and margin of each pair; nothing is drawn."""
        return _compare(model, batch)


def _pixels_of(sample: Sample) -> Float[Tensor, "3 H W"]:
    assert sample.image is not None, "pairs of a reward are never encoded beforehand"
    return sample.image


def _compare(model: LearningReward, batch: Sequence[Preference]) -> dict[str, Float[Tensor, " b"]]:
    """Return numbers of each pair.

    Returns:
        `loss`; `accuracy`, 1 where the higher reward is the preferred image's, NaN for a tie; and
        `margin`, how much higher the reward of the preferred image is, 0 for a tie.
    """
    samples = [pair.first for pair in batch] + [pair.second for pair in batch]
    pixels = torch.stack([_pixels_of(sample) for sample in samples]).to(model.device)
    rewards = model.compare((pixels + 1) / 2, [pair.first.caption for pair in batch])
    first = rewards.new_tensor([pair.label for pair in batch])
    labels = torch.stack([first, 1 - first])
    loss = kl_div(rewards.log_softmax(0), labels, reduction="none").sum(0)
    lead = rewards[0] - rewards[1]
    right = (lead.detach() * (first - 0.5)).sign() / 2 + 0.5
    accuracy = right.masked_fill(first == 0.5, torch.nan)
    return {"loss": loss, "accuracy": accuracy, "margin": (2 * first - 1) * lead}
