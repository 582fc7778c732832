"""CLIP-IQA (arXiv 2207.12396): how much more an image looks like a good prompt than a bad one."""

from collections.abc import Sequence
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from sfumato.rewards.clip import ClipReward
from sfumato.rewards.reward import Reward, Score


@final
class ClipIqaReward(Reward):
    """Score the probability of `good` against `bad`, whatever the prompt of the image.

    p = softmax(exp(logit_scale) * [cos(image, good), cos(image, bad)])[0], the mean over pairs.
    """

    def __init__(self, clip: ClipReward, good: Sequence[str], bad: Sequence[str]) -> None:
        """Compare by `clip`, whose score is exp(logit_scale) x cosine, prompts pair by pair."""
        super().__init__()
        check_pairs(good, bad)
        self.clip = clip
        self.good, self.bad = list(good), list(bad)
        self._margins: Tensor | None = None
        self.eval()

    def _apply(self, *args: Any, **kwargs: Any) -> "ClipIqaReward":
        self._margins = None  # of weights on another device, or in another precision
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> "ClipIqaReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return a number in [0, 1] for each image."""
        if self._margins is None:  # as the weights are frozen
            good, bad = self.clip.text_features([*self.good, *self.bad]).split(len(self.good))
            self._margins = good - bad
        # A product and a sum, as autocast would round a matrix product.
        margin = (self.clip.image_features(images)[:, None] * self._margins).sum(-1)
        return Score((self.clip.scale * margin).sigmoid().mean(1))  # of two, softmax is sigmoid


def check_pairs(good: Sequence[str], bad: Sequence[str]) -> None:
    """Refuse prompts that are not pairs with a ValueError."""
    if len(good) != len(bad) or not good:
        raise ValueError(
            f"reward.good has {len(good)} prompts and reward.bad has {len(bad)}; give a bad one "
            "against each good one"
        )
