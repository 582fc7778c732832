"""DiffusionNFT: regress sampled images towards good ones and away from bad ones (arXiv 2509.16117).

    p    = 1/2 + clip(A, -c, c) / 2c                               the share that is for an image
    x0+  = beta x0 + (1 - beta) x0_old,  x0- = (1 + beta) x0_old - beta x0
    L+-  = mean((x0+- - x)^2 / mean|x0+- - x|)                     x: the sampled image
    loss = c mean(p L+ + (1 - p) L-) / beta + kl_coeff * kl

x0 and x0_old are what policy and old policy predict of the image at a noise level of the solver.
The old policy samples; after each collection it moves towards the policy.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import NftConfig
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Reading
from sfumato.models.model import Latents, TextToImageModel
from sfumato.objectives.collected import CollectedObjective, Rows, column
from sfumato.objectives.objective import Loss, Piece

LEAST_ERROR = 1e-5


@final
class DiffusionNft(CollectedObjective):
    """Learn from images, by how good they are; a batch is a list of rollouts."""

    config: NftConfig
    needs_old = True

    def begin(self, model: TextToImageModel, rng: Rng) -> None:
        """Move the old policy; before the first step it is the policy."""
        assert self.old is not None, "the training state brings it"
        rise = self.config.old_decay_rise * self._done
        self.old.follow(min(rise, self.config.old_decay))

    def roll_out(
        self, model: TextToImageModel, prompts: Sequence[str], rng: Rng
    ) -> tuple[Latents, Mapping[str, Tensor]]:
        assert self.old is not None, "the training state brings it"
        with self.old.shown():
            x0 = self.sampled(model, prompts, rng)
        return x0, {"x0": x0}

    def pieces(self, model: TextToImageModel, batch: Rows, rng: Rng) -> Sequence[Piece]:
        times = [t for t in self.times(model)[:-1] if float(model.process.alpha(t)) > 0]
        order = torch.stack([rng.uniform() for _ in times]).argsort(0)
        count = min(self.config.trained_times, len(times))
        calls: list[Piece] = []
        for k in range(count):
            t = torch.tensor(times)[order[k]].to(model.device)
            x0 = column(batch, "x0", model.device)
            noise = rng.normal(*x0.shape[1:], device=model.device)
            calls.append(partial(self._at, model, batch, x0, noise, t, 1 / count))
        return calls

    def _at(
        self,
        model: TextToImageModel,
        batch: Rows,
        x0: Float[Tensor, "b *d"],
        noise: Float[Tensor, "b *d"],
        t: Float[Tensor, " b"],
        share: float,
    ) -> Loss:
        assert self.old is not None, "the training state brings it"
        prompts = [row.prompt for row in batch]
        x_t = model.process.add_noise(x0, noise, t)
        with self.old.shown(), torch.no_grad():
            old = self.denoiser(model, prompts, guided=False)(x_t, t).x0
        said = self.denoiser(model, prompts, guided=False)(x_t, t)
        bound, beta = self.config.advantage_clip, self.config.beta
        positive = share_of(column(batch, "advantage", model.device), bound)
        for_it = error(beta * said.x0 + (1 - beta) * old, x0)
        against = error((1 + beta) * old - beta * said.x0, x0)
        losses = bound * (positive * for_it + (1 - positive) * against) / beta
        metrics = {"old_distance": (said.x0 - old).square().mean()}
        return self.finished(model, batch, Reading(t, x_t, said), losses, metrics, share)

    def row_shapes(self, model: TextToImageModel) -> dict[str, Sequence[int]]:
        return {**super().row_shapes(model), "x0": self._latent_shape(model)}


def share_of(advantage: Float[Tensor, " b"], bound: float) -> Float[Tensor, " b"]:
    """Return p: 1 for the best images, 0 for the worst, 1/2 for those that tell nothing."""
    return 0.5 + advantage.clamp(-bound, bound) / (2 * bound)


def error(predicted: Float[Tensor, "b *d"], x0: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return each row's squared error over its mean absolute error, which has no gradient."""
    difference = (predicted - x0).flatten(1)
    size = difference.detach().abs().mean(1).clamp(min=LEAST_ERROR)
    return difference.square().mean(1) / size
