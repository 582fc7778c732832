"""Closed-form rewards of pixels, for tests, demos and debugging."""

import io
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sfumato.rewards.reward import Reward, Score

CHANNELS = ("red", "green", "blue")
BYTES_PER_KILOBYTE = 1000


@final
class ColorReward(Reward):
    """Score scale * (mean of one channel - mean of the two others), in [-scale, scale]."""

    def __init__(self, color: str, scale: float = 20.0) -> None:
        """Prefer `color`, which is "red", "green" or "blue".

        Raises:
            ValueError: if `color` is no channel.
        """
        super().__init__()
        if color not in CHANNELS:
            raise ValueError(f"color is {color!r}; choose one of {', '.join(CHANNELS)}")
        self.color = color
        self.scale = scale

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images, whatever their prompts."""
        means = _channel_means(images)
        preferred = means[:, CHANNELS.index(self.color)]
        others = (means.sum(1) - preferred) / 2
        return Score(self.scale * (preferred - others))


@final
class BrightnessReward(Reward):
    """Score scale * (mean of all channels and pixels), in [0, scale]."""

    def __init__(self, scale: float = 20.0) -> None:
        """Prefer white; a negative `scale` prefers black."""
        super().__init__()
        self.scale = scale

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images, whatever their prompts."""
        return Score(self.scale * _channel_means(images).mean(1))


@final
class JpegCompressibility(Reward):
    """Score minus the kilobytes (1000 bytes) of the JPEG of quality 95.

    The reward of DDPO (Black et al., arXiv 2305.13301, section 5.1); it has no gradient.
    """

    differentiable = False

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Score images, rounded to 8 bits and clamped to [0, 1], whatever their prompts."""
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        sizes = [_jpeg_bytes(row) for row in pixels.cpu()]
        kilobytes = torch.tensor(sizes, device=images.device) / BYTES_PER_KILOBYTE
        return Score(-kilobytes)


def _channel_means(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3"]:
    return images.mean((2, 3), dtype=torch.promote_types(images.dtype, torch.float32))


def _jpeg_bytes(pixels: Tensor) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=95)
    return buffer.tell()
