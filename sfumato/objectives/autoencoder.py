"""Training of an autoencoder: pictures come back from their latents.

    e    = decode(mean + noise x deviation + u x other noise) - x,   x in [-1, 1]
    loss = mean(|e|) + square_coeff mean(e^2)
         + edge_coeff (mean |difference of e to the right| + mean |difference of e below|)
         + kl_coeff mean over latents of KL(posterior || standard normal)

u is uniform from 0 to latent_noise for each picture, in units of the latents that models are
trained on: so the decoder learns to bear the errors of such a model. Validation has no noise.

The third term asks for sharp edges: it is zero for an error that is the same everywhere. There is
no adversarial and no perceptual term, so the pictures are of few details.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import AutoencoderConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.randomness import Rng
from sfumato.objectives.objective import Loss, ObjectiveOf


@runtime_checkable
class Reconstructing(Protocol):
    """An autoencoder, as its objective knows it; see `LearningAutoencoder`."""

    @property
    def device(self) -> torch.device: ...

    def latent_shape(self, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int, int]: ...

    def reconstruct(
        self,
        images: Float[Tensor, "b 3 h w"],
        noise: Float[Tensor, "b c y x"] | None,
        error: Float[Tensor, "b c y x"] | None = None,
    ) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b m y x"]]: ...


@final
class Autoencoder(ObjectiveOf[Reconstructing, Sequence[Sample]]):
    """Learn to encode and decode; a batch is a list of pictures of one size."""

    needs_reference = False
    why_idle = "the pictures come back as they are"

    def __init__(self, config: AutoencoderConfig) -> None:
        self._config = config

    def loss(self, model: Reconstructing, batch: Sequence[Sample], rng: Rng) -> Loss:
        images = pixels_of(batch).to(model.device)
        shape = model.latent_shape(images)
        noise = rng.normal(*shape, device=model.device)
        error = None
        if self._config.latent_noise > 0:
            level = self._config.latent_noise * rng.uniform(model.device)
            error = level[:, None, None, None] * rng.normal(*shape, device=model.device)
        rows = self._rows(images, *model.reconstruct(images, noise, error))
        metrics = {name: values.detach().mean() for name, values in rows.items()}
        return Loss(rows["loss"].mean(), metrics)

    @torch.no_grad()
    def stable_metrics(
        self,
        model: Reconstructing,
        batch: Sequence[Sample],
        positions: Sequence[int],
        seed: int,
    ) -> Mapping[str, Float[Tensor, " b"]]:
        """Return loss, psnr and latent_kl of each picture, whose latents are their mean."""
        images = pixels_of(batch).to(model.device)
        return self._rows(images, *model.reconstruct(images, None))

    def _rows(
        self,
        images: Float[Tensor, "b 3 h w"],
        decoded: Float[Tensor, "b 3 h w"],
        moments: Float[Tensor, "b m y x"],
    ) -> dict[str, Float[Tensor, " b"]]:
        """Return numbers of each picture: loss; psnr in decibels; latent_kl per latent, in nats."""
        weights, error = self._config, decoded - images
        square = error.square().flatten(1).mean(1)
        edges = error.diff(dim=3).abs().flatten(1).mean(1)
        edges = edges + error.diff(dim=2).abs().flatten(1).mean(1)
        kl = normal_kl(moments)
        loss = error.abs().flatten(1).mean(1) + weights.square_coeff * square
        loss = loss + weights.edge_coeff * edges + weights.kl_coeff * kl
        shown = (decoded.clamp(-1, 1) - images).square().flatten(1).mean(1)
        return {"loss": loss, "psnr": -10 * (shown / 4).log10(), "latent_kl": kl}


def pixels_of(batch: Sequence[Sample]) -> Float[Tensor, "b 3 h w"]:
    """Return the pictures of a batch, in [-1, 1]."""
    images = [sample.image for sample in batch]
    assert all(image is not None for image in images), "an autoencoder reads pictures"
    return torch.stack([image for image in images if image is not None])


def normal_kl(moments: Float[Tensor, "b m y x"]) -> Float[Tensor, " b"]:
    """Return KL(N(mean, variance) || N(0, 1)) of each picture, the mean over its latents.

    Source: diffusers' DiagonalGaussianDistribution.kl, there the sum, with its bounds.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
