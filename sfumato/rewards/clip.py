"""CLIP-architecture rewards (PickScore, HPSv2, CLIPScore): scale * cos(image, text)."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.clip import ClipParts, load_clip, preprocess
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score
from sfumato.rewards.towers import Tokens, at_least_float32, recompute, refuse_unequal


@final
class ClipReward(Reward):
    """Score the match of image and prompt by a frozen CLIP, differentiably in the images.

    CLIPScore (arXiv 2104.08718), PickScore (arXiv 2305.01569) and HPSv2 (arXiv 2306.09341) differ
    in weights, preprocessing and scale only. Images are taken as they come, also outside [0, 1]: a
    clamp here would stop the gradient of saturated pixels, so whoever wants one (the objective)
    clamps before.

    Attributes:
        learns: whether somebody trains the weights, under autocast if they want it.
        scale: by default exp(logit_scale), near 100 for published models; PickScore's values are
            near 20.
    """

    def __init__(
        self, parts: ClipParts, *, score: str = "model", gradient_checkpointing: bool = False
    ) -> None:
        """Take over and freeze the model of `parts`.

        Args:
            score: model (exp(logit_scale) x cosine), model_over_26 (that / 26), cosine, cosine_100
                (100 x cosine) or clipscore (2.5 x the cosine, which is 0 where it is below).
            gradient_checkpointing: recompute each layer in the backward pass instead of keeping
                its activations.
        """
        super().__init__()
        self.model = parts.model.requires_grad_(False)
        self.tokens = Tokens(parts.tokenizer, parts.max_tokens, cleans=parts.cleans)
        self.image_settings = parts.image_settings
        self.max_tokens = parts.max_tokens
        learned = parts.model.logit_scale
        self.scale = _scale(score, 1.0 if learned.is_meta else math.exp(learned.item()))
        self._is_clipscore = score == "clipscore"
        self.learns = False
        if gradient_checkpointing:
            for tower in (self.model.vision_model, self.model.text_model):
                recompute(tower.encoder.layers)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        *,
        processor: str | None = None,
        score: str = "model",
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> "ClipReward":
        """Load from a folder of transformers or OpenCLIP, or from a hub id (its local cache first).

        Args:
            processor: folder or hub id of the tokenizer and preprocessor_config.json, by default
                `path_or_hub_id`. PickScore's published recipe takes those of
                laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
            dtype: of the frozen weights; preprocessing and cosine stay in float32 or better.
            score, gradient_checkpointing: as in the constructor.

        Raises:
            ValueError: if a folder or a file is missing, unreadable, or of another kind of model.
        """
        parts = load_clip(path_or_hub_id, processor)
        # Cast last: bfloat16 would round logit_scale and with it change the scale by a percent.
        return cls(parts, score=score, gradient_checkpointing=gradient_checkpointing).to(dtype)

    def train(self, mode: bool = True) -> "ClipReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return `scale * cos(image, text)` row by row.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        refuse_unequal(images, prompts)
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(1)
        if self._is_clipscore:
            cosine = cosine.clamp(min=0)
        return Score(self.scale * cosine)

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embed images in [0, 1] as unit vectors, differentiably."""
        pixels = preprocess(images, self.image_settings)
        with self._precise():
            pooled = self.model.vision_model(pixel_values=pixels, return_dict=True).pooler_output
            return unit(self.model.visual_projection(pooled))

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embed prompts as unit vectors; warn once if one has to be cut."""
        tokens = self.tokens(prompts, self.model.logit_scale.device)
        with self._precise():
            pooled = self.model.text_model(**tokens, return_dict=True).pooler_output
            return unit(self.model.text_projection(pooled))

    def _precise(self) -> AbstractContextManager[object]:
        return nullcontext() if self.learns else without_autocast(self.model.logit_scale)


def unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Normalise rows, in float32 at least: bfloat16 would round a score of 20 to eighths."""
    return F.normalize(at_least_float32(features), dim=-1)


def _scale(score: str, learned: float) -> float:
    """Return what the cosine is multiplied by.

    Args:
        learned: exp(logit_scale) of the model.
    """
    published = {
        "model": learned,
        "model_over_26": learned / 26,  # Flow-GRPO's PickScore
        "cosine": 1.0,  # DanceGRPO's PickScore
        "cosine_100": 100.0,
        "clipscore": 2.5,  # w of arXiv 2104.08718, whose cosine is 0 at least
    }
    if score not in published:
        raise ValueError(f"score={score!r} is unknown; choose one of {', '.join(published)}")
    return published[score]
