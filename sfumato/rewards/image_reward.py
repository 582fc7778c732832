"""ImageReward 1.0 (arXiv 2304.05977): a BLIP that reads image and prompt, and a head.

Source: ImageReward.py of THUDM/ImageReward.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.clip import ImageRewardParts, ImageSettings, load_image_reward, preprocess
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.towers import Tokens, at_least_float32, recompute, refuse_unequal

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, as published
MAX_TOKENS = 35


@final
class ImageReward(Reward):
    """Score the match of image and prompt as ImageReward 1.0, differentiably in the images.

    score = (head(h) - mean) / std, where h is the text tower's state at the first token; the head
    has no activations. Images are not clamped.

    Attributes:
        scale: 1 / std.
    """

    scale = 1 / STD

    def __init__(self, parts: ImageRewardParts, *, gradient_checkpointing: bool = False) -> None:
        """Take over and freeze the two towers and the head.

        Args:
            gradient_checkpointing: recompute each layer of the image tower in the backward pass
                instead of keeping its activations.
        """
        super().__init__()
        self.vision, self.text, self.head = parts.vision, parts.text, parts.head
        self.requires_grad_(False)
        self.tokens = Tokens(parts.tokenizer, MAX_TOKENS)
        side = self.vision.config.image_size
        assert isinstance(side, int)
        self.image_settings = ImageSettings(side, side, rounds=True)
        if gradient_checkpointing:
            encoder = self.vision.encoder
            recompute(encoder.layers)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        *,
        processor: str,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> "ImageReward":
        """Load the published file; inside `torch.device("meta")` no weight is read.

        Args:
            path_or_hub_id: the file, its folder or its hub id. A med_config.json beside it states
                the text tower; without one it is the published one.
            processor: folder or hub id of BERT's tokenizer, bert-base-uncased.
            dtype: of the frozen towers; preprocessing and head stay in float32 or better.

        Raises:
            ValueError: if a file is missing, damaged, or of another kind of model.
        """
        parts = load_image_reward(path_or_hub_id, processor)
        reward = cls(parts, gradient_checkpointing=gradient_checkpointing)
        reward.to(dtype).head.to(torch.promote_types(dtype, torch.float32))
        return reward

    def train(self, mode: bool = True) -> "ImageReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return the score row by row; warn once of a prompt that is cut.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        refuse_unequal(images, prompts)
        pixels = preprocess(images, self.image_settings)
        first = next(self.head.parameters())
        with without_autocast(self.vision.post_layernorm.weight):
            seen = self.vision(pixel_values=pixels, return_dict=True).last_hidden_state
            tokens = self.tokens(prompts, first.device)
            read = self.text(
                input_ids=tokens["input_ids"],
                attention_mask=None if seen.is_meta else tokens["attention_mask"],
                encoder_hidden_states=seen,
                return_dict=True,
            )
        with without_autocast(first):
            raw = self.head(at_least_float32(read.last_hidden_state[:, 0]))[:, 0]
            return Score((raw - MEAN) / STD)
