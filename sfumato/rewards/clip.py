"""CLIP-architecture rewards (CLIPScore, PickScore): exp(logit_scale) * cos(image, text)."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.clip import ClipParts, load_clip, preprocess
from sfumato.precision import without_autocast
from sfumato.rewards.reward import Reward, Score


@final
class ClipReward(Reward):
    """Score the match of image and prompt by a frozen CLIP, differentiably in the images.

    CLIPScore (arXiv 2104.08718) and PickScore (arXiv 2305.01569) differ in weights only. Images
    are taken as they come, also outside [0, 1]: a clamp here would stop the gradient of saturated
    pixels, so whoever wants one (the objective) clamps before. Gradients do not reach the text.

    Attributes:
        scale: exp(logit_scale), near 100 for published models; PickScore's values are near 20.
    """

    def __init__(self, parts: ClipParts, *, gradient_checkpointing: bool = False) -> None:
        """Take over and freeze the model of `parts`.

        Args:
            gradient_checkpointing: recompute each layer of the image tower in the backward pass
                instead of keeping its activations.
        """
        super().__init__()
        self.model = parts.model.requires_grad_(False)
        self.tokenizer = parts.tokenizer
        self.image_settings = parts.image_settings
        self.max_tokens = parts.max_tokens
        scale = parts.model.logit_scale
        self.scale = 1.0 if scale.is_meta else math.exp(scale.item())
        self._warned_of_truncation = False
        if gradient_checkpointing:
            recompute_layers(self.model.vision_model.encoder)
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
        with without_autocast(self.model.logit_scale):
            pooled = self.model.vision_model(pixel_values=pixels, return_dict=True).pooler_output
            return unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embed prompts as unit vectors, without gradient; warn once if one has to be cut."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.logit_scale.device)
        if tokens["input_ids"].shape[1] == self.max_tokens and not self._warned_of_truncation:
            self._warn_of_truncation(prompts)
        with without_autocast(self.model.logit_scale):
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                return_dict=True,
            ).pooler_output
            return unit(self.model.text_projection(pooled))

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


@final
class _Checkpointed(nn.Module):
    """Recompute a layer in the backward pass; transformers itself does so in training mode only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            self.layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )


def recompute_layers(encoder: Any) -> None:
    """Let an encoder of transformers recompute each layer in the backward pass."""
    encoder.layers = nn.ModuleList([_Checkpointed(layer) for layer in encoder.layers])


def unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Normalise rows, in float32 at least: bfloat16 would round a score of 20 to eighths."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
