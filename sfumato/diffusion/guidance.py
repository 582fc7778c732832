"""Guidance: linear combinations of predictions at one state.

classifier-free    uncond + scale (cond - uncond)                      arXiv 2207.12598
in an interval     guided for low <= t <= high, else cond alone        arXiv 2404.07724
annealed           (1 - w_i) reference + w_i policy at step i of T     arXiv 2409.06493
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.process import Prediction, Time
from sfumato.diffusion.sampling import Denoiser

CfgGradient: TypeAlias = Literal["full", "detach_uncond", "rescale"]


def classifier_free(
    cond: Float[Tensor, "b *d"],
    uncond: Float[Tensor, "b *d"],
    scale: float,
    gradient: CfgGradient = "full",
) -> Float[Tensor, "b *d"]:
    """Combine the raw outputs with and without the prompt.

    Args:
        gradient: `full` differentiates the formula; the branches then receive gradients multiplied
            by scale and 1 - scale. `detach_uncond` stops the unconditional one. `rescale` divides
            both by sqrt(scale^2 + (scale - 1)^2), so that together they have the norm that an
            unguided prediction would receive. The value is the same in all three.
    """
    if gradient == "detach_uncond":
        uncond = uncond.detach()
    guided = uncond + scale * (cond - uncond)
    if gradient == "rescale":
        fixed = guided.detach()
        guided = fixed + (guided - fixed) / math.hypot(scale, scale - 1)
    return guided


def within(guided: Denoiser, cond: Denoiser, low: float, high: float) -> Denoiser:
    """Guide in low <= t <= high alone; elsewhere the network runs once, with the prompt."""

    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        assert isinstance(t, float), "an interval of guidance is defined on a sampling grid"
        return guided(x_t, t) if low <= t <= high else cond(x_t, t)

    return denoiser


def annealed_weights(schedule: str, steps: int) -> tuple[float, ...]:
    """Return the policy's weight at each of `steps` steps.

    Args:
        schedule: `base` (0), `draft` (1), `linear` (i / T), `power_P` ((i / T)^P), e.g. `power_2`,
            or `step_F` (1 from the fraction F of the steps on, else 0), e.g. `step_0.3`.

    Raises:
        ValueError: if the schedule is none of these.
    """
    name, *numbers = schedule.split("_")
    try:
        parameters = [float(number) for number in numbers]
    except ValueError:
        parameters = [math.nan]
    shape: Callable[[float], float]
    match name, parameters:
        case "base", []:
            shape = lambda _: 0.0  # noqa: E731
        case "draft", []:
            shape = lambda _: 1.0  # noqa: E731
        case "linear", []:
            shape = lambda x: x  # noqa: E731
        case "power", [p] if 0 < p < math.inf:
            shape = lambda x: x**p  # noqa: E731
        case "step", [f] if 0 <= f <= 1:
            shape = lambda x: float(x >= f)  # noqa: E731
        case _:
            raise ValueError(
                f"unknown schedule {schedule!r} for annealed importance guidance; use base, draft, "
                "linear, power_P with P > 0 (power_2), or step_F with 0 <= F <= 1 (step_0.3)"
            )
    return tuple(shape(i / steps) for i in range(steps))


def annealed_importance(
    policy: Denoiser, reference: Denoiser, schedule: str, times: Sequence[float]
) -> Denoiser:
    """Anneal from reference to policy along `times`; one network runs where one suffices."""
    weights = dict(zip(times, annealed_weights(schedule, len(times) - 1), strict=False))

    def denoiser(x_t: Tensor, t: Time) -> Prediction:
        assert isinstance(t, float), "annealed importance guidance is defined on a sampling grid"
        weight = weights[t]
        if weight == 0.0:
            return reference(x_t, t)
        if weight == 1.0:
            return policy(x_t, t)
        return reference(x_t, t).lerp(policy(x_t, t), weight)

    return denoiser
