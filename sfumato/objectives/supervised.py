"""Supervised fine-tuning: regress what the network predicts at a random time.

loss = mean over rows of w(t) * error, as objectives/noised.py has it
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SupervisedConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.process import DiffusionProcess, PredictionType
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import Latents, TextToImageModel
from sfumato.objectives.noised import (
    Noised,
    check_guidance,
    conditioning_of,
    draw_noised,
    errors_of,
    latents_of,
    stable_noised,
    times_table,
)
from sfumato.objectives.objective import Loss, Objective

BINS = 10  # of t, in which the loss is reported
FLOW_HAS_NO_SNR = (
    "objective.weighting = min_snr is for epsilon, v and sample predictions, and this model "
    "predicts flow; use none or bump"
)


@final
class Supervised(Objective[Sequence[Sample]]):
    """Learn images with their captions; a batch is a list of samples of one size and kind."""

    needs_reference = False

    def __init__(self, config: SupervisedConfig) -> None:
        self.config = config

    def check(self, model: TextToImageModel) -> None:
        """Refuse settings that do not fit a model.

        Raises:
            ValueError: naming the setting.
        """
        if self.config.weighting == "min_snr" and model.prediction_type == "flow":
            raise ValueError(FLOW_HAS_NO_SNR)
        check_guidance(self.config, model)

    def loss(self, model: TextToImageModel, batch: Sequence[Sample], rng: Rng) -> Loss:
        size, device = batch[0].size, model.device
        posterior = rng.normal(*model.latent_shape(*size)) if self.config.sample_latents else None
        noised = draw_noised(self.config, model, size, rng)
        errors = self._errors(model, batch, noised, posterior)
        loss = (self._weights(model, noised.t, size).to(errors) * errors).mean()
        plain = errors.detach()
        bins = binned("mse", plain, noised.t.to(device))
        return Loss(loss, {"loss": loss.detach(), "mse": plain.mean()}, bins)

    @torch.no_grad()
    def stable_errors(
        self, model: TextToImageModel, batch: Sequence[Sample], positions: Sequence[int], seed: int
    ) -> Float[Tensor, " b"]:
        """Return the error of each sample at a noise and a time that are always its own.

        Sample i takes the noise of (seed, i) and the i-th, going round, of 8 equidistant times;
        its latents are the posterior's mean, its caption is never dropped, and no weight is used:
        so the mean over a set moves with the weights of the network alone.
        """
        noised = stable_noised(model, batch[0].size, positions, seed)
        return self._errors(model, batch, noised, None)

    def stable_metrics(
        self, model: TextToImageModel, batch: Sequence[Sample], positions: Sequence[int], seed: int
    ) -> Mapping[str, Float[Tensor, " b"]]:
        """Return `stable_errors` by the name that validation logs."""
        return {"loss": self.stable_errors(model, batch, positions, seed)}

    def _errors(
        self,
        model: TextToImageModel,
        batch: Sequence[Sample],
        noised: Noised,
        posterior: Latents | None,
    ) -> Float[Tensor, " b"]:
        x0 = latents_of(model, batch, posterior)
        cond = conditioning_of(model, batch, noised.dropped)
        guidance, t = self.config.guidance_scale, noised.t.to(model.device)
        return errors_of(model, x0, noised.noise, t, cond, guidance_scale=guidance)

    def _weights(
        self, model: TextToImageModel, t: Float[Tensor, " b"], size: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        match self.config.weighting:
            case "min_snr":
                return min_snr(model.process, model.prediction_type, t, self.config.snr_gamma)
            case "bump":
                return bump(t, times_table(model, size))
            case _:
                return torch.ones_like(t)


def min_snr(
    process: DiffusionProcess, prediction_type: PredictionType, t: Float[Tensor, " b"], gamma: float
) -> Float[Tensor, " b"]:
    """Return min(SNR, gamma) as a weight of the loss on x0, in the network's own prediction.

    Source: arXiv 2303.09556, section 3.4.

    Raises:
        ValueError: for flow predictions, which the paper does not weigh.
    """
    snr = (process.alpha(t) / process.sigma(t)).square()
    clipped = snr.clamp(max=gamma)
    match prediction_type:
        case "epsilon":
            # At SNR 0 the ratio is 1, as for every SNR below gamma.
            return torch.where(snr > 0, clipped / snr, torch.ones_like(snr))
        case "v_prediction":
            return clipped / (snr + 1)
        case "sample":
            return clipped
        case "flow":
            raise ValueError(FLOW_HAS_NO_SNR)


def bump(t: Float[Tensor, " b"], table: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
    """Return DiffSynth-Studio's weight, highest in the middle, with mean 1 over the table.

    y(t) = exp(-2 (t - 1/2)^2), w(t) = (y(t) - min y) n / sum(y - min y)
    """

    def y(times: Tensor) -> Tensor:
        return torch.exp(-2 * (times - 0.5) ** 2)

    low = y(table).min()
    return ((y(t) - low) * len(table) / (y(table) - low).sum()).clamp(min=0)


def binned(
    name: str, errors: Float[Tensor, " b"], t: Float[Tensor, " b"]
) -> dict[str, Float[Tensor, "2"]]:
    """Return sum and count of the errors in each tenth of t, by name."""
    index = (t * BINS).ceil().long().clamp(1, BINS) - 1
    rows = torch.stack([errors.float(), torch.ones_like(t)], 1)
    sums = torch.zeros(BINS, 2, device=t.device).index_add_(0, index, rows)
    names = [f"{name}_by_t/{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]
    return dict(zip(names, sums, strict=True))
