"""CLIP-architecture rewards (CLIPScore, PickScore): exp(logit_scale) * cos(image, text)."""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.clip import ClipParts, load_clip, preprocess
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score


@final
class ClipReward(Reward):
    """Score the match of image and prompt by a frozen CLIP, differentiably in the images.

    CLIPScore (arXiv 2104.08718) and PickScore (arXiv 2305.01569) differ in weights only. Images
    are taken as they come, also outside [0, 1]: a clamp here would stop the gradient of saturated
    pixels, so whoever wants one (the objective) clamps before.

    Attributes:
        learns: whether somebody trains the weights, under autocast if they want it.
        scale: exp(logit_scale), near 100 for published models; PickScore's values are near 20.
    """

    def __init__(self, parts: ClipParts, *, gradient_checkpointing: bool = False) -> None:
        """Take over and freeze the model of `parts`.

        Args:
            gradient_checkpointing: recompute each layer in the backward pass instead of keeping
                its activations.
        """
        super().__init__()
        self.model = parts.model.requires_grad_(False)
        self.tokenizer = parts.tokenizer
        self.image_settings = parts.image_settings
        self.max_tokens = parts.max_tokens
        scale = parts.model.logit_scale
        self.scale = 1.0 if scale.is_meta else math.exp(scale.item())
        self.learns = False
        self._warned_of_truncation = False
        if gradient_checkpointing:
            for tower in (self.model.vision_model, self.model.text_model):
                for layer in tower.encoder.layers:
                    layer.forward = partial(_recomputed, layer.forward)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        *,
        processor: str | None = None,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> "ClipReward":
        """Load from a folder of transformers or OpenCLIP, or from a hub id (its local cache first).

        Args:
            processor: folder or hub id of the tokenizer and preprocessor_config.json, by default
                `path_or_hub_id`. PickScore's published recipe takes those of
                laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
            dtype: of the frozen weights; preprocessing and cosine stay in float32 or better.
            gradient_checkpointing: as in the constructor.

        Raises:
            ValueError: if a folder or a file is missing, unreadable, or of another kind of model.
        """
        parts = load_clip(path_or_hub_id, processor)
        # Cast last: bfloat16 would round logit_scale and with it change the scale by a percent.
        return cls(parts, gradient_checkpointing=gradient_checkpointing).to(dtype)

    def train(self, mode: bool = True) -> "ClipReward":
        """Stay in evaluation mode: with dropout one image would have many scores."""
        return super().train(False)

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Return `scale * cos(image, text)` row by row.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(
                f"{len(images)} images came with {len(prompts)} prompts; give one prompt per image"
            )
        cosine = (self.image_features(images) * self.text_features(prompts)).sum(1)
        return Score(self.scale * cosine)

    def image_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embed images in [0, 1] as unit vectors, differentiably."""
        pixels = preprocess(images, self.image_settings)
        with self._precise():
            pooled = self.model.vision_model(pixel_values=pixels, return_dict=True).pooler_output
            return _unit(self.model.visual_projection(pooled))

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embed prompts as unit vectors; warn once if one has to be cut."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.logit_scale.device)
        if tokens["input_ids"].shape[1] == self.max_tokens and not self._warned_of_truncation:
            self._warn_of_truncation(prompts)
        with self._precise():
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                return_dict=True,
            ).pooler_output
            return _unit(self.model.text_projection(pooled))

    def _precise(self) -> AbstractContextManager[object]:
        return nullcontext() if self.learns else without_autocast(self.model.logit_scale)

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            if length > self.max_tokens:
                warnings.warn(
                    f"the reward reads {self.max_tokens} of the {length} tokens of the prompt "
                    f"{prompt!r}; shorten such prompts if their ends matter (said once)",
                    stacklevel=2,
                )
                self._warned_of_truncation = True
                return


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Recompute a layer in the backward pass; transformers itself does so in training mode only."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Normalise rows, in float32 at least: bfloat16 would round a score of 20 to eighths."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
