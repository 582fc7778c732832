"""Diffusion-DPO: of two images of a caption, the preferred one gains more likelihood.

    z    = -beta / 2 [(e_1 - e_1^ref) - (e_2 - e_2^ref)]
    loss = -mean over pairs of [y log sigmoid(z) + (1 - y) log sigmoid(-z)]

y is the probability that image 1 is preferred, and e the mean over channels and pixels of
(raw - target)^2, at one time and one noise that both images and the reference share. z is the log
odds that the networks give to image 1, the implicit reward's margin.

Source: arXiv 2311.12908, eq. 14 with constant weights, as in the authors' own code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from sfumato.config import DpoConfig
from sfumato.data.sample import Preference
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import Conditioning, Framing, Latents, Role, TextToImageModel
from sfumato.objectives.noised import (
    Noised,
    check_guidance,
    conditioning_of,
    draw_noised,
    errors_of,
    latents_of,
    stable_noised,
)
from sfumato.objectives.objective import Loss, Objective


@dataclass(frozen=True)
class Compared:
    """What policy and reference say of pairs.

    Attributes:
        errors: of the policy, for both images.
        labels: probability that the first image is preferred.
        odds: z, the log odds that the first image is preferred.
    """

    errors: Float[Tensor, "2 b"]
    labels: Float[Tensor, " b"]
    odds: Float[Tensor, " b"]

    @property
    def loss(self) -> Float[Tensor, " b"]:
        """The cross-entropy of each pair."""
        y, z = self.labels, self.odds
        return -(y * logsigmoid(z) + (1 - y) * logsigmoid(-z))

    @property
    def accuracy(self) -> Float[Tensor, " b"]:
        """1 where the odds agree with the label, 0 where not; 1/2 if one of them is even."""
        return 0.5 + (self.labels - 0.5) * self.odds.sign()

    @property
    def margin(self) -> Float[Tensor, " b"]:
        """The log odds of the preferred image; 0 for a tie."""
        return (2 * self.labels - 1) * self.odds


@final
class Dpo(Objective[Sequence[Preference]]):
    """Learn preferences against the frozen reference; a batch is a list of pairs of one size."""

    why_idle = "each pair is a tie (data.pairs.ties=drop leaves them out)"

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def check(self, model: TextToImageModel) -> None:
        """Refuse settings that do not fit a model.

        Raises:
            ValueError: naming the setting.
        """
        check_guidance(self.config, model)

    def loss(self, model: TextToImageModel, batch: Sequence[Preference], rng: Rng) -> Loss:
        size = batch[0].first.size
        shape, posterior = model.latent_shape(*size), None
        if self.config.sample_latents:
            posterior = torch.cat([rng.normal(*shape), rng.normal(*shape)])
        noised = draw_noised(self.config, model, size, rng)
        found = self._compared(model, batch, noised, posterior)
        value, (first, second), y = found.loss.mean(), found.errors.detach(), found.labels
        metrics = {
            "loss": value.detach(),
            "accuracy": found.accuracy.detach().mean(),
            "margin": found.margin.detach().mean(),
            "mse": (first + second).mean() / 2,
            "mse_preferred": (y * first + (1 - y) * second).mean(),
            "mse_other": ((1 - y) * first + y * second).mean(),
        }
        return Loss(value, metrics)

    @torch.no_grad()
    def stable_metrics(
        self,
        model: TextToImageModel,
        batch: Sequence[Preference],
        positions: Sequence[int],
        seed: int,
    ) -> Mapping[str, Float[Tensor, " b"]]:
        """Return loss, accuracy and margin of each pair, at a noise and time always its own."""
        noised = stable_noised(model, batch[0].first.size, positions, seed)
        found = self._compared(model, batch, noised, None)
        return {"loss": found.loss, "accuracy": found.accuracy, "margin": found.margin}

    def _compared(
        self,
        model: TextToImageModel,
        batch: Sequence[Preference],
        noised: Noised,
        posterior: Latents | None,
    ) -> Compared:
        samples = [pair.first for pair in batch] + [pair.second for pair in batch]
        x0 = latents_of(model, samples, posterior)
        noise, t = noised.noise.repeat(2, 1, 1, 1), noised.t.to(model.device).repeat(2)
        framing = [Framing(row.original, row.crop) for row in samples]

        def captions(role: Role) -> Conditioning:
            """Encode each caption once for both images."""
            cond = conditioning_of(model, samples[: len(batch)], noised.dropped, role)
            return cond.repeat(2).framed(framing)

        def errors(role: Role, cond: Conditioning) -> Float[Tensor, "2 b"]:
            scale = self.config.guidance_scale
            found = errors_of(model, x0, noise, t, cond, guidance_scale=scale, role=role)
            return found.unflatten(0, (2, -1))

        cond = captions("policy")
        # The reference first: its activations are gone before the policy's are kept.
        with torch.no_grad():
            frozen = errors("reference", captions("reference") if model.trains_text else cond)
        policy = errors("policy", cond)
        gained = policy - frozen
        labels = torch.tensor([pair.label for pair in batch], device=policy.device).to(policy)
        return Compared(policy, labels, -self.config.beta / 2 * (gained[0] - gained[1]))
