"""Images from prompts and seeds, for validation, evaluation and inference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.diffusion.guidance import CfgGradient, annealed_importance, within
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser, sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.limits import check_guidance
from sfumato.models.model import Conditioning, Role, TextToImageModel


@dataclass(frozen=True)
class Guided:
    """Prompts, and the negative or empty ones that guidance leads away from, or None."""

    cond: Conditioning
    uncond: Conditioning | None

    def repeat(self, times: int) -> "Guided":
        """Return the whole batch stacked `times` times, one after another."""
        uncond = self.uncond.repeat(times) if self.uncond is not None else None
        return Guided(self.cond.repeat(times), uncond)


def encode_guided(
    model: TextToImageModel,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    role: Role = "policy",
    *,
    guided: bool = True,
) -> Guided:
    """Encode prompts, and the negative one if classifier-free guidance needs it.

    `sampler.prompt_cache` is how many prompts' states are kept (`encode_alone`).
    """
    keep = sampler.prompt_cache

    def encode(texts: Sequence[str]) -> Conditioning:
        if keep and model.device.type != "meta":  # a plan counts each prompt
            return model.encode_alone(texts, keep)
        return model.encode_prompts(texts, role=role)

    cond = encode(prompts)
    if not (guided and model.has_cfg and sampler.guidance_scale > 1):
        return Guided(cond, None)
    return Guided(cond, encode([sampler.negative_prompt or ""]).repeat(len(prompts)))


def guided_denoiser(
    model: TextToImageModel,
    prompts: Guided,
    sampler: SamplerConfig,
    role: Role = "policy",
    cfg_gradient: CfgGradient = "full",
) -> Denoiser:
    """Return the denoiser of these prompts, guided where `sampler` says so.

    Raises:
        ValueError: if the sampler has settings of guidance that the model cannot have.
    """
    guided = model.denoiser(
        prompts.cond,
        uncond=prompts.uncond,
        guidance_scale=sampler.guidance_scale,
        role=role,
        cfg_gradient=cfg_gradient,
    )
    if not model.has_cfg:
        check_guidance(sampler)
    if sampler.guidance_interval is None:
        return guided
    low, high = sampler.guidance_interval
    return within(guided, model.denoiser(prompts.cond, role=role), low, high)


def rollout_times(
    model: TextToImageModel, sampler: SamplerConfig, height: int, width: int
) -> Sequence[float]:
    """Return the times of an objective's rollout, from noise to data."""
    return model.spaced_times(sampler.rollout_steps, height, width, sampler.training_spacing)


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
    steps, scheduled = sampler.num_inference_steps, None
    if sampler.scheduler is not None:
        scheduled = model.scheduled(sampler.scheduler, steps, height, width)
    times = scheduled.times if scheduled else model.times(steps, height, width)
    rng = Rng(seeds)
    noise = rng.normal(*model.latent_shape(height, width), device=model.device)
    guided = encode_guided(model, prompts, sampler)
    policy = guided_denoiser(model, guided, sampler)
    if model.trains_text and schedule != "draft":
        guided = encode_guided(model, prompts, sampler, "reference")
    reference = guided_denoiser(model, guided, sampler, "reference")
    denoiser = annealed_importance(policy, reference, schedule, times)
    if scheduled:
        x = scheduled.sample(denoiser, noise, rng)
    else:
        solver = cast(Solver, sampler.solver)
        x = sample(denoiser, model.process, noise, times, eta=sampler.eta, rng=rng, solver=solver).x
    images = model.decode(x)
    if not images.isfinite().all():
        what = "latents" if not x.isfinite().all() else "decoded images"
        raise ValueError(
            f"the {what} are not finite; lower sampler.guidance_scale "
            f"({sampler.guidance_scale:g}), or set model.dtype=float32"
        )
    return images.clamp(0, 1)


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
