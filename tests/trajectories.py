"""The same images by a family here and by diffusers' own pipeline, from the same noise."""

from typing import Any

import torch
from torch import Tensor

from sfumato.config import SamplerConfig
from sfumato.diffusion.process import Prediction, Time
from sfumato.diffusion.sampling import sample
from sfumato.diffusion.solvers import Solver
from sfumato.models.generate import encode_guided, guided_denoiser
from sfumato.models.pipeline_model import PipelineModel

PROMPTS = ["a red star", "a small blue ring on a yellow background"]


def our_run(
    model: PipelineModel,
    noise: Tensor,
    steps: int,
    scale: float,
    solver: Solver = "first_order",
    negative: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return the state after each step, and the images."""
    sampler = SamplerConfig(guidance_scale=scale, negative_prompt=negative)
    guided = encode_guided(model, PROMPTS[: len(noise)], sampler)
    denoiser = guided_denoiser(model, guided, sampler)
    states = []

    def watched(x_t: Tensor, t: Time) -> Prediction:
        states.append(x_t)
        return denoiser(x_t, t)

    height, width = (side * model.limits.factor for side in noise.shape[2:])
    with torch.no_grad():
        times = model.times(steps, height, width)
        end = sample(watched, model.process, noise, times, solver=solver).x
        return [*states[1:], end], model.decode(end).clamp(0, 1)


def their_run(
    model: PipelineModel, pipeline: Any, noise: Tensor, steps: int, scale: float, **more: Any
) -> tuple[list[Tensor], Tensor]:
    """Return diffusers' latents after each step, and its images."""
    states = []

    def keep(_pipeline: Any, _step: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(values["latents"])
        return values

    images = pipeline(
        PROMPTS[: len(noise)],
        height=noise.shape[2] * model.limits.factor,
        width=noise.shape[3] * model.limits.factor,
        num_inference_steps=steps,
        output_type="pt",
        callback_on_step_end=keep,
        **(model.pipeline_arguments(noise, scale) | more),
    ).images
    return states, images
