"""Images from prompts and seeds, for validation, evaluation and inference."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.diffusion.guidance import annealed_importance
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.models.model import Conditioning, Role, TextToImageModel


@dataclass(frozen=True)
class Guided:
    """Prompts, and the empty prompts that guidance leads away from, or None."""

    cond: Conditioning
    uncond: Conditioning | None


def encode_guided(
    model: TextToImageModel, prompts: Sequence[str], guidance_scale: float, role: Role = "policy"
) -> Guided:
    """Encode prompts, and the empty prompt if classifier-free guidance needs it."""
    cond = model.encode_prompts(prompts, role=role)
    if not model.has_cfg or guidance_scale <= 1:
        return Guided(cond, None)
    return Guided(cond, model.encode_prompts([""], role=role).repeat(len(prompts)))


def image_size(model: TextToImageModel, sampler: SamplerConfig) -> tuple[int, int]:
    """Return the height and width in pixels that the settings ask for."""
    if sampler.height and sampler.width:
        return sampler.height, sampler.width
    height, width = model.image_size()
    return sampler.height or height, sampler.width or width


@torch.no_grad()
def generate(
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    *,
    schedule: str = "draft",
) -> Float[Tensor, "b 3 H W"]:
    """Return one image per prompt and seed, in [0, 1]; an image depends only on its own seed.

    Args:
        schedule: annealed importance guidance: `draft` uses only the policy, `base` only the
            reference; others as in `annealed_weights`.

    Raises:
        ValueError: if an image has NaN or infinity.
    """
    height, width = image_size(model, sampler)
    times = model.times(sampler.num_inference_steps, height, width)
    rng = Rng(seeds)
    noise = rng.normal(*model.latent_shape(height, width), device=model.device)
    guided = encode_guided(model, prompts, sampler.guidance_scale)
    policy = _denoiser(model, guided, sampler, "policy")
    if model.trains_text and schedule != "draft":
        guided = encode_guided(model, prompts, sampler.guidance_scale, "reference")
    reference = _denoiser(model, guided, sampler, "reference")
    denoiser = annealed_importance(policy, reference, schedule, times)
    trajectory = sample(denoiser, model.process, noise, times, eta=sampler.eta, rng=rng)
    images = model.decode(trajectory.x)
    if not images.isfinite().all():
        what = "latents" if not trajectory.x.isfinite().all() else "decoded images"
        raise ValueError(
            f"the {what} are not finite; lower sampler.guidance_scale "
            f"({sampler.guidance_scale:g}), or set model.dtype=float32"
        )
    return images.clamp(0, 1)


def _denoiser(
    model: TextToImageModel, guided: Guided, sampler: SamplerConfig, role: Role
) -> Denoiser:
    return model.denoiser(
        guided.cond, uncond=guided.uncond, guidance_scale=sampler.guidance_scale, role=role
    )


def generate_in_batches(
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    batch_size: int,
    *,
    schedule: str = "draft",
) -> Float[Tensor, "b 3 H W"]:
    """Return the images of `generate` on the CPU, made `batch_size` at a time."""
    parts = [
        generate(
            model,
            prompts[start : start + batch_size],
            seeds[start : start + batch_size],
            sampler,
            schedule=schedule,
        ).cpu()
        for start in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts)
