"""A CLIP reward whose weights are trained, and its folder for transformers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.clip import save_processor
from sfumato.rewards.clip import ClipReward
from sfumato.rewards.reward import LearningReward


@final
class LearningClip(LearningReward):
    """Both towers, their projections and logit_scale are trained, in float32.

    Dropout stays off, as in all published CLIPs.

    Attributes:
        trained: holds the parameters; its forward is `compare`.
    """

    def __init__(self, reward: ClipReward, *, start_scale: float | None = None) -> None:
        """Take over a reward.

        Args:
            start_scale: exp(logit_scale) at the start; None keeps the model's.
        """
        model, reward.learns = reward.model, True
        reward.tokens.cleans = False  # as transformers reads the folder that is exported
        model.logit_scale = nn.Parameter(model.logit_scale.detach().view(1))  # FSDP has no scalars
        model.requires_grad_(True)
        if start_scale is not None:
            model.logit_scale.data.fill_(math.log(start_scale))
        self._reward = reward
        self.trained: nn.Module = _Comparison(reward)

    @property
    def device(self) -> torch.device:
        return self._reward.model.logit_scale.device

    def to(self, device: torch.device) -> None:
        """Move the networks, in place."""
        self.trained.to(device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return all parameters by their names in `trained`."""
        return dict(self.trained.named_parameters())

    def shards(self) -> Sequence[nn.Module]:
        """Return the modules that FSDP shards one by one: layers first, then what calls them."""
        towers = (self._reward.model.vision_model, self._reward.model.text_model)
        return [*(layer for tower in towers for layer in tower.encoder.layers), self.trained]

    def compare(
        self, images: Float[Tensor, "_ 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, "n b"]:
        return self.trained(images, prompts)

    def save(self, folder: Path) -> None:
        """Write what `reward.pretrained` and transformers' CLIPModel load."""
        weights = self._reward.model.state_dict()
        weights["logit_scale"] = weights["logit_scale"].view(())
        self._reward.model.save_pretrained(folder, state_dict=weights)
        self._reward.tokens.tokenizer.save_pretrained(folder)
        save_processor(self._reward.image_settings, folder)


@final
class _Comparison(nn.Module):
    """Scores of stacked batches of images, as one forward: FSDP gathers weights around it."""

    def __init__(self, reward: ClipReward) -> None:
        super().__init__()
        self.reward = reward

    def forward(
        self, images: Float[Tensor, "_ 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, "n b"]:
        texts = self.reward.text_features(prompts)
        pictures = self.reward.image_features(images).unflatten(0, (-1, len(prompts)))
        return self.reward.model.logit_scale.exp() * (pictures * texts).sum(2)
