"""Prediction at one random time: the draws of a batch, and the errors of the network there.

    x_t   = alpha(t) x0 + sigma(t) noise
    error = mean over channels and pixels of (raw - target)^2

The target is noise (epsilon), alpha noise - sigma x0 (v), x0 (sample) or noise - x0 (flow).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import NoisedConfig
from sfumato.data.sample import Sample
from sfumato.diffusion.process import Prediction
from sfumato.diffusion.randomness import Rng
from sfumato.models.model import Conditioning, Framing, Latents, Role, TextToImageModel

STABLE_TIMES = 8
TABLE = 1000  # entries of a family's shifted table


@dataclass(frozen=True)
class Noised:
    """What is drawn for each row before the network predicts.

    Attributes:
        t: on the CPU.
        dropped: whether the caption is replaced by the empty one.
    """

    noise: Latents
    t: Float[Tensor, " b"]
    dropped: Sequence[bool]


def draw_noised(
    config: NoisedConfig, model: TextToImageModel, size: tuple[int, int], rng: Rng
) -> Noised:
    """Draw noise, time and dropout of rows whose images have a size in pixels."""
    shape, device = model.latent_shape(*size), model.device
    noise = rng.normal(*shape, device=device)
    if config.noise_offset:
        noise = noise + config.noise_offset * rng.normal(shape[0], 1, 1, device=device)
    t = _times(config, model, size, rng.uniform())
    return Noised(noise, t, (rng.uniform() < config.caption_dropout).tolist())


def stable_noised(
    model: TextToImageModel, size: tuple[int, int], positions: Sequence[int], seed: int
) -> Noised:
    """Return noise and time of rows in a set that are always their own, without dropout."""
    noise = Rng.of_step(seed, 0, positions).normal(*model.latent_shape(*size), device=model.device)
    u = torch.tensor([(i % STABLE_TIMES + 0.5) / STABLE_TIMES for i in positions])
    return Noised(noise, model.process.on_grid(u), [False] * len(positions))


def errors_of(
    model: TextToImageModel,
    x0: Latents,
    noise: Latents,
    t: Float[Tensor, " b"],
    cond: Conditioning,
    *,
    guidance_scale: float,
    role: Role = "policy",
) -> Float[Tensor, " b"]:
    """Return each row's mean squared error over channels and pixels."""
    denoiser = model.denoiser(cond, guidance_scale=guidance_scale, role=role)
    return errors_at(model, denoiser(model.process.add_noise(x0, noise, t), t), x0, noise, t)


def errors_at(
    model: TextToImageModel,
    said: Prediction,
    x0: Latents,
    noise: Latents,
    t: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """Return each row's mean squared error of what a network said at t."""
    target = model.process.target(model.prediction_type, x0, noise, t)
    return (said.raw - target).square().flatten(1).mean(1)


def check_guidance(config: NoisedConfig, model: TextToImageModel) -> None:
    """Refuse guidance as an input of networks that have no such input with a ValueError."""
    if config.guidance_scale != 1 and model.has_cfg:
        raise ValueError(
            f"objective.guidance_scale = {config.guidance_scale} is told to networks with "
            "embedded guidance, and this model has none; leave it at 1"
        )


def _times(
    config: NoisedConfig, model: TextToImageModel, size: tuple[int, int], u: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Return one t per row, from a uniform number."""
    match config.timesteps:
        case "uniform":
            return model.process.on_grid(u)
        case "logit_normal":  # arXiv 2403.03206, eq. 19
            normal = torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
            z = config.logit_mean + config.logit_std * normal
            return model.process.on_grid(z.sigmoid().float())
        case _:
            table = times_table(model, size)
            return table[(u * len(table)).long()]


def times_table(model: TextToImageModel, size: tuple[int, int]) -> Float[Tensor, " n"]:
    """Return the family's own training times: its sampling grid of 1000 steps."""
    if not model.process.has_free_times:
        return model.process.on_grid(torch.arange(TABLE) / TABLE)
    return torch.tensor(model.times(TABLE, *size)[:-1])


@torch.no_grad()
def latents_of(model: TextToImageModel, batch: Sequence[Sample], noise: Latents | None) -> Latents:
    """Return the latents of samples, encoded now or beforehand; no noise takes the mean."""
    noise = noise.to(model.device) if noise is not None else None
    encoded = [row.encoded.moments for row in batch if row.encoded is not None]
    if encoded:
        with torch.autocast("cpu", enabled=False):  # bf16's refuses to stack float16
            moments = torch.stack(encoded).to(model.device).float()
        return model.draw_latents(moments, noise)
    images = torch.stack([row.pixels for row in batch])
    return model.encode_images(images.to(model.device), noise)


def conditioning_of(
    model: TextToImageModel,
    batch: Sequence[Sample],
    dropped: Sequence[bool],
    role: Role = "policy",
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
        return model.encode_prompts(captions, role=role, framing=framing)
    with torch.autocast("cpu", enabled=False):
        cond = Conditioning.stack(rows)
    there = {name: tensor.to(model.device) for name, tensor in cond.tensors.items()}
    return Conditioning(there).framed(framing)
