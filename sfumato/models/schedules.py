"""Time grids of released schedulers, from their own settings."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.process import Time, VariancePreserving

SAME_STEPS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")
SIGMA_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def flow_times(
    scheduler: Any,
    num_inference_steps: int,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> list[float]:
    """Return the T + 1 times of a FlowMatchEulerDiscreteScheduler, where sigma is t.

    Args:
        mu: of the dynamic shift, where the scheduler's settings ask for it.
        sigmas: before shifting; None is the scheduler's own grid.
    """
    given = {} if mu is None else {"mu": mu}
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, **given)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), **given)
    return torch.as_tensor(scheduler.sigmas).double().tolist()


def dynamic_mu(settings: Any, tokens: int) -> float | None:
    """Return the shift's mu for an image of so many tokens, linear between two sizes.

    Returns None where the scheduler's settings ask for no dynamic shift. Source: diffusers'
    `calculate_shift`, with the settings of scheduler_config.json and its defaults.
    """
    if not settings["use_dynamic_shifting"]:
        return None
    small, large = settings["base_image_seq_len"], settings["max_image_seq_len"]
    slope = (settings["max_shift"] - settings["base_shift"]) / (large - small)
    return settings["base_shift"] + slope * (tokens - small)


def ddim_of(released: Any, **changes: Any) -> Any:
    """Return a DDIMScheduler over a released scheduler's table and grid; warn what it drops."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    settings, name = released.config, type(released).__name__
    sigmas = [key for key in SIGMA_GRIDS if settings.get(key)]
    if name not in SAME_STEPS or sigmas:
        what = f"{name} with {', '.join(sigmas)}" if sigmas else name
        warnings.warn(
            f"this model was released with {what}; here DDIM samples it, and images differ",
            stacklevel=2,
        )
    spacing = settings.get("timestep_spacing", "leading")  # else DDIM's default would be taken
    # DDIM's default would clip latents to the range of pixels, where a file does not say.
    return DDIMScheduler.from_config(
        settings, clip_sample=False, timestep_spacing=spacing, **changes
    )


def table_times(table: VariancePreserving, scheduler: Any, num_inference_steps: int) -> list[float]:
    """Return the T + 1 times of a DDIMScheduler over its table of training steps."""
    scheduler.set_timesteps(num_inference_steps)
    available = table.num_train_timesteps
    indices = [min(int(index), available - 1) for index in scheduler.timesteps]
    last = -1 if scheduler.config["set_alpha_to_one"] else 0
    return [table.time(index) for index in [*indices, last]]


def table_index(table: VariancePreserving, t: Time, device: torch.device) -> Tensor:
    """Return the training step of t on the device; a number is filled in, without a copy."""
    index = table.index(t)
    return index if isinstance(index, Tensor) else torch.full((), index, device=device)
