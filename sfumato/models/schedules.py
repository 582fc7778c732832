"""Time grids of released schedulers, computed by the schedulers from their own settings."""

import warnings
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.process import Time, VariancePreserving

SAME_STEPS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")
SIGMA_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def flow_times(
    scheduler: Any, num_inference_steps: int, tokens: int, *, even: bool = False
) -> list[float]:
    """Return the T + 1 times of a FlowMatchEulerDiscreteScheduler, where sigma is t.

    Args:
        tokens: of the image, for a dynamic shift.
        even: whether sigma falls evenly to 1 / T before it is shifted; otherwise the scheduler's
            own grid is shifted.
    """
    mu = _dynamic_mu(scheduler.config, tokens)
    shift = {} if mu is None else {"mu": mu}
    if even:
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        scheduler.set_timesteps(sigmas=torch.tensor(sigmas, dtype=torch.float64).numpy(), **shift)
    else:
        scheduler.set_timesteps(num_inference_steps, **shift)
    return torch.as_tensor(scheduler.sigmas).double().tolist()


def _dynamic_mu(settings: Any, tokens: int) -> float | None:
    """Return the shift's mu for a number of tokens, linear between two sizes; None without one.

    Source: diffusers' `calculate_shift`, with the settings of scheduler_config.json.
    """
    if not settings["use_dynamic_shifting"]:
        return None
    small, large = settings["base_image_seq_len"], settings["max_image_seq_len"]
    slope = (settings["max_shift"] - settings["base_shift"]) / (large - small)
    return settings["base_shift"] + slope * (tokens - small)


def ddim_of(released: Any, **changes: Any) -> Any:
    """Return a DDIMScheduler with a released scheduler's table and grid; warn if steps differ."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings, name = released.config, type(released).__name__
    sigmas = [key for key in SIGMA_GRIDS if settings.get(key)]
    if name not in SAME_STEPS or sigmas:
        what = f"{name} with {', '.join(sigmas)}" if sigmas else name
        warnings.warn(
            f"this model was released with {what}; Sfumato samples it with DDIM, and images differ",
            stacklevel=2,
        )
    # DDIM's own defaults: another spacing, and latents clipped to the range of pixels.
    spacing = settings.get("timestep_spacing", "leading")
    return DDIMScheduler.from_config(
        settings, clip_sample=False, timestep_spacing=spacing, **changes
    )


def respaced(scheduler: Any, spacing: str) -> Any:
    """Return a scheduler with another spacing of its steps."""
    return type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)


def table_times(table: VariancePreserving, scheduler: Any, num_inference_steps: int) -> list[float]:
    """Return the T + 1 times of a DDIMScheduler over its table of training steps."""
    scheduler.set_timesteps(num_inference_steps)
    available = table.num_train_timesteps
    # diffusers' trailing grid of some T, such as 61, has one more step, before the table's first.
    steps = scheduler.timesteps[:num_inference_steps]
    indices = [min(int(index), available - 1) for index in steps]
    last = -1 if scheduler.config["set_alpha_to_one"] else 0
    return [table.time(index) for index in [*indices, last]]


def table_index(table: VariancePreserving, t: Time, device: torch.device) -> Tensor:
    """Return the training step of t, on the device; a number becomes a tensor without a copy.

    A scheduler of diffusers may ask between two steps.
    """
    index = table.index(t)
    if isinstance(index, Tensor):
        return index
    assert not isinstance(t, Tensor), "rows have rows of steps"
    exact = t * table.num_train_timesteps - 1
    return torch.full((), index if abs(index - exact) < 1e-6 else exact, device=device)
