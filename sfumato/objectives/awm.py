"""Advantage-weighted matching: a policy gradient whose log-likelihood is the supervised loss.

    log p  = -l(mean((raw - target)^2), t)                l(e, t) = e, or t e^(1/4) / (1/4)
    ratio  = exp(log p - log p_old)
    loss   = mean over times, rows of max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + kl_coeff * kl

Source: arXiv 2509.25050. Noise and time are drawn when an image is sampled, so that p and p_old,
the policy that sampled, are asked the same. Training predicts without classifier-free guidance.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import AwmConfig
from sfumato.diffusion.process import Prediction
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Reading
from sfumato.models.model import Latents, TextToImageModel
from sfumato.objectives.collected import CollectedObjective, Rows, column
from sfumato.objectives.noised import errors_at
from sfumato.objectives.objective import Loss, Piece
from sfumato.objectives.policy_gradient import clipped_loss

POWER, FLOOR = 0.25, 1e-10


@final
class AdvantageWeightedMatching(CollectedObjective):
    """Weigh the supervised loss of sampled images by their advantages; a batch is rollouts."""

    config: AwmConfig

    def roll_out(
        self, model: TextToImageModel, prompts: Sequence[str], rng: Rng
    ) -> tuple[Latents, Mapping[str, Tensor]]:
        x0 = self.sampled(model, prompts, rng)
        count, policy = self.config.trained_times, self.denoiser(model, prompts, guided=False)
        made: dict[str, list[Tensor]] = {"t": [], "noise": [], "log_likelihoods": []}
        for k in range(count):
            t = model.process.on_grid((k + rng.uniform()) / count).to(model.device)
            noise = rng.normal(*x0.shape[1:], device=model.device)
            x_t = model.process.add_noise(x0, noise, t)
            found = self._log_likelihood(model, policy(x_t, t), x0, noise, t)
            for name, value in zip(made, (t, noise, found), strict=True):
                made[name].append(value)
        return x0, {"x0": x0, **{name: torch.stack(each, 1) for name, each in made.items()}}

    def _log_likelihood(
        self,
        model: TextToImageModel,
        said: Prediction,
        x0: Float[Tensor, "b *d"],
        noise: Float[Tensor, "b *d"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        errors = errors_at(model, said, x0, noise, t)
        if self.config.likelihood == "mse":
            return -errors
        return -((errors + FLOOR) ** POWER - FLOOR**POWER) * t / POWER

    def row_shapes(self, model: TextToImageModel) -> dict[str, Sequence[int]]:
        shape, times = self._latent_shape(model), (self.config.trained_times,)
        own = {"x0": shape, "t": times, "noise": (*times, *shape), "log_likelihoods": times}
        return {**super().row_shapes(model), **own}

    def pieces(self, model: TextToImageModel, batch: Rows, rng: Rng) -> Sequence[Piece]:
        count = self.config.trained_times
        return [partial(self._at, model, batch, k, 1 / count) for k in range(count)]

    def _at(self, model: TextToImageModel, batch: Rows, k: int, share: float) -> Loss:
        x0 = column(batch, "x0", model.device)
        t, noise, before = (
            column(batch, name, model.device, k) for name in ("t", "noise", "log_likelihoods")
        )
        x_t = model.process.add_noise(x0, noise, t)
        said = self.denoiser(model, [row.prompt for row in batch], guided=False)(x_t, t)
        change = self._log_likelihood(model, said, x0, noise, t) - before
        advantage = column(batch, "advantage", model.device)
        losses, clipped = clipped_loss(change, advantage, self.config.clip_range)
        return self.finished(
            model, batch, Reading(t, x_t, said), losses, {"clipped": clipped}, share
        )
