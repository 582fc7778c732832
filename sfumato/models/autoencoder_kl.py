"""AutoencoderKL: images to latents and back, and the sizes in its settings."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.precision import dtype_of


def moments_kl(vae: Any, images: Float[Tensor, "b 3 *d"]) -> Float[Tensor, "b m *s"]:
    """Encode images with an AutoencoderKL to mean and log-variance, float32."""
    return vae.encode(images.to(dtype_of(vae))).latent_dist.parameters.float()


def posterior(
    moments: Float[Tensor, "b m h w"], noise: Float[Tensor, "b c h w"] | None
) -> Float[Tensor, "b c h w"]:
    """Return mean + noise x standard deviation, or without noise the mean; not normalised.

    Source: diffusers' DiagonalGaussianDistribution, with its bounds of the log-variance.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return mean if noise is None else mean + noise * (0.5 * log_variance.clamp(-30, 20)).exp()


def latents_kl(
    vae: Any, moments: Float[Tensor, "b m h w"], noise: Float[Tensor, "b c h w"] | None
) -> Float[Tensor, "b c h w"]:
    """Return (draw - shift) scale of an AutoencoderKL's moments, float32; no noise: the mean.

    Source: diffusers' pipelines, with `latents_mean` and `latents_std` if config.json has them.
    """
    latents = posterior(moments, noise)
    mean, std = _statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / std


def decode_kl(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
    """Decode latents / scale + shift with an AutoencoderKL to images around [0, 1], float32."""
    mean, std = _statistics(vae, latents)
    latents = latents * std / vae.config.scaling_factor + mean
    return (vae.decode(latents.to(dtype_of(vae))).sample.float() + 1) / 2


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return the mean and the standard deviation of latents from the autoencoder's settings."""
    settings = vae.config
    if settings.latents_mean is None or settings.latents_std is None:
        return settings.shift_factor or 0.0, 1.0
    mean, std = (
        torch.tensor(values, device=like.device).view(1, -1, 1, 1)
        for values in (settings.latents_mean, settings.latents_std)
    )
    return mean, std


def downsampling(vae: Mapping[str, Any]) -> int:
    """Return how many pixels of a side one latent of an AutoencoderKL stands for."""
    return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)  # the default of diffusers


def latent_size(sample_size: int | list[int] | None, factor: int) -> tuple[int, int] | None:
    """Return height and width in pixels of a U-Net's `sample_size`."""
    if sample_size is None:
        return None
    sides = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
    return sides[0] * factor, sides[1] * factor
