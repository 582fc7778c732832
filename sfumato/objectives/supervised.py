"""Supervised fine-tuning: regress what the network predicts at a random time.

    x_t  = alpha(t) x0 + sigma(t) noise
    loss = mean over rows of w(t) * mean over channels and pixels of (raw - target)^2

The target is noise (epsilon), alpha noise - sigma x0 (v), x0 (sample) or noise - x0 (flow).
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SupervisedConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.process import DiffusionProcess, PredictionType
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import Conditioning, Framing, TextToImageModel
from sfumato.objectives.objective import Loss, Objective

BINS = 10  # of t, in which the loss is reported
STABLE_TIMES = 8
FLOW_HAS_NO_SNR = (
    "objective.weighting = min_snr is for epsilon, v and sample predictions, and this model "
    "predicts flow; use none or bump"
)
TABLE = 1000  # entries of a family's shifted table


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
        if self.config.guidance_scale != 1 and model.has_cfg:
            raise ValueError(
                f"objective.guidance_scale = {self.config.guidance_scale} is told to networks with "
                "embedded guidance, and this model has none; leave it at 1"
            )

    def loss(self, model: TextToImageModel, batch: Sequence[Sample], rng: Rng) -> Loss:
        device, shape = model.device, _latent_shape(model, batch)
        posterior = rng.normal(*shape) if self.config.sample_latents else None
        noise = rng.normal(*shape, device=device)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * rng.normal(shape[0], 1, 1, device=device)
        t = self._times(model, batch, rng)
        dropped = (rng.uniform() < self.config.caption_dropout).tolist()
        errors = self._errors(model, batch, dropped, noise, t.to(device), posterior)
        loss = (self._weights(model, t, batch).to(errors) * errors).mean()
        plain = errors.detach()
        return Loss(
            loss, {"loss": loss.detach(), "mse": plain.mean()}, binned("mse", plain, t.to(device))
        )

    @torch.no_grad()
    def stable_errors(
        self, model: TextToImageModel, batch: Sequence[Sample], positions: Sequence[int], seed: int
    ) -> Float[Tensor, " b"]:
        """Return the error of each sample at a noise and a time that are always its own.

        Sample i takes the noise of (seed, i) and the i-th, going round, of 8 equidistant times;
        its latents are the posterior's mean, its caption is never dropped, and no weight is used:
        so the mean over a set moves with the weights of the network alone.
        """
        device, shape = model.device, _latent_shape(model, batch)
        noise = Rng.of_step(seed, 0, positions).normal(*shape, device=device)
        t = model.process.on_grid(
            torch.tensor([(i % STABLE_TIMES + 0.5) / STABLE_TIMES for i in positions])
        )
        return self._errors(model, batch, [False] * len(batch), noise, t.to(device), None)

    def _errors(
        self,
        model: TextToImageModel,
        batch: Sequence[Sample],
        dropped: Sequence[bool],
        noise: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        posterior: Float[Tensor, "b c h w"] | None,
    ) -> Float[Tensor, " b"]:
        """Return each row's mean squared error."""
        drawn = posterior.to(model.device) if posterior is not None else None
        x0 = latents_of(model, batch, drawn)
        cond = conditioning_of(model, batch, dropped)
        denoiser = model.denoiser(cond, guidance_scale=self.config.guidance_scale)
        raw = denoiser(model.process.add_noise(x0, noise, t), t).raw
        target = model.process.target(model.prediction_type, x0, noise, t)
        return (raw - target).square().flatten(1).mean(1)

    def _times(
        self, model: TextToImageModel, batch: Sequence[Sample], rng: Rng
    ) -> Float[Tensor, " b"]:
        """Draw one t per row."""
        u = rng.uniform()
        match self.config.timesteps:
            case "uniform":
                return model.process.on_grid(u)
            case "logit_normal":  # arXiv 2403.03206, eq. 19
                normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
                z = self.config.logit_mean + self.config.logit_std * normal
                return model.process.on_grid(z.sigmoid().float())
            case _:
                table = self._table(model, batch)
                return table[(u * len(table)).long()]

    def _table(self, model: TextToImageModel, batch: Sequence[Sample]) -> Float[Tensor, " n"]:
        """Return the family's own training times: its sampling grid of 1000 steps."""
        if not model.process.has_free_times:
            return model.process.on_grid(torch.arange(TABLE) / TABLE)
        height, width = batch[0].size
        return torch.tensor(model.times(TABLE, height, width)[:-1])

    def _weights(
        self, model: TextToImageModel, t: Float[Tensor, " b"], batch: Sequence[Sample]
    ) -> Float[Tensor, " b"]:
        match self.config.weighting:
            case "min_snr":
                return min_snr(model.process, model.prediction_type, t, self.config.snr_gamma)
            case "bump":
                return bump(t, self._table(model, batch))
            case _:
                return torch.ones_like(t)


@torch.no_grad()
def latents_of(
    model: TextToImageModel, batch: Sequence[Sample], noise: Float[Tensor, "b c h w"] | None
) -> Float[Tensor, "b c h w"]:
    """Return the latents of samples, encoded now or beforehand; no noise takes the mean."""
    encoded = [row.encoded.moments for row in batch if row.encoded is not None]
    if encoded:
        with torch.autocast("cpu", enabled=False):  # bf16's refuses to stack float16
            moments = torch.stack(encoded).to(model.device).float()
        return model.draw_latents(moments, noise)
    images = torch.stack([row.pixels for row in batch])
    return model.encode_images(images.to(model.device), noise)


def conditioning_of(
    model: TextToImageModel, batch: Sequence[Sample], dropped: Sequence[bool]
) -> Conditioning:
    """Return the captions of samples, encoded now or beforehand; dropped ones are empty."""
    framing = [Framing(row.original, row.crop) for row in batch]
    rows = [
        Conditioning(row.encoded.empty if drop else row.encoded.text)
        for row, drop in zip(batch, dropped, strict=True)
        if row.encoded is not None
    ]
    if not rows:
        captions = ["" if drop else row.caption for row, drop in zip(batch, dropped, strict=True)]
        return model.encode_prompts(captions, framing=framing)
    with torch.autocast("cpu", enabled=False):
        cond = Conditioning.stack(rows)
    there = {name: tensor.to(model.device) for name, tensor in cond.tensors.items()}
    return Conditioning(there).framed(framing)


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


def _latent_shape(model: TextToImageModel, batch: Sequence[Sample]) -> tuple[int, int, int]:
    return model.latent_shape(*batch[0].size)
