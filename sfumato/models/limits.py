"""Limits of a model, read from its JSON files before a weight is loaded: sizes, steps, guidance."""

from dataclasses import dataclass

from sfumato.config import SamplerConfig
from sfumato.config.train import FLOW_SCHEDULERS


@dataclass(frozen=True)
class Limits:
    """Image sizes, sampling steps and guidance that a model can do."""

    channels: int  # of latents
    factor: int  # pixels of a side per latent
    multiple: int  # pixels that a side must be a multiple of
    size: tuple[int, int] | None  # height and width in pixels; None if no file states it
    min_steps: int = 1  # of a sampling run
    max_steps: int | None = None  # of a sampling run; None if time is continuous
    largest: int | None = None  # pixels of a side, if positions come from a table
    has_cfg: bool = True  # False if guidance is an input of the network

    def tokens(self, height: int, width: int) -> int:
        """Return the number of tokens of an image, `multiple` pixels a side each."""
        return (height // self.multiple) * (width // self.multiple)


def check_side(name: str, pixels: int, limits: Limits) -> None:
    """Refuse a side that the model cannot divide; name the nearest that it can.

    Raises:
        ValueError: naming the setting.
    """
    unit = limits.multiple
    if pixels < unit or pixels % unit:
        nearest = max(unit, round(pixels / unit) * unit)
        nearest = min(nearest, limits.largest or nearest)
        raise ValueError(
            f"{name} = {pixels} must be a multiple of {unit} pixels for this "
            f"model; the nearest is {nearest}"
        )
    if limits.largest is not None and pixels > limits.largest:
        raise ValueError(
            f"{name} = {pixels} is more than the {limits.largest} pixels that this model "
            f"has positions for; set {limits.largest} or less"
        )


def check_steps(steps: int, limits: Limits, key: str = "num_inference_steps") -> None:
    """Refuse more sampling steps than the model has, or fewer than its settings allow.

    Args:
        key: of the sampler's setting.

    Raises:
        ValueError: naming the setting.
    """
    if steps < limits.min_steps:
        raise ValueError(
            f"sampler.{key} = {steps} is too few for this model; take {limits.min_steps} or more"
        )
    if limits.max_steps is not None and steps > limits.max_steps:
        raise ValueError(
            f"sampler.{key} = {steps} is more than the {limits.max_steps} steps that this model "
            f"was trained on; set {limits.max_steps} or less"
        )


def check_sampling(sampler: SamplerConfig, limits: Limits) -> None:
    """Refuse steps, a spacing or an interval of guidance that the model does not have.

    Raises:
        ValueError: naming the setting.
    """
    check_steps(sampler.num_inference_steps, limits)
    if sampler.training_steps is not None:
        check_steps(sampler.training_steps, limits, "training_steps")
    if limits.max_steps is None:
        check_spacing(sampler.training_spacing)
    check_scheduler_class(sampler.scheduler, is_flow=limits.max_steps is None)
    if not limits.has_cfg:
        check_guidance(sampler)


def check_spacing(spacing: str | None) -> None:
    """Refuse a spacing of steps, for a model without a table of them.

    Raises:
        ValueError: naming the setting.
    """
    if spacing is not None:
        raise ValueError(
            f"sampler.training_spacing = {spacing} is a spacing of the steps that a model was "
            "trained on, and the time of this model is continuous; leave it out"
        )


def check_scheduler_class(name: str | None, *, is_flow: bool) -> None:
    """Refuse a scheduler of diffusers that does not follow a flow model's settings.

    Raises:
        ValueError: naming the setting.
    """
    if name is not None and is_flow and name not in FLOW_SCHEDULERS:
        raise ValueError(
            f"sampler.scheduler = {name} does not fit the noise of this model, which predicts a "
            f"flow; choose {', '.join(FLOW_SCHEDULERS)}, or leave it out and set sampler.solver"
        )


def check_guidance(sampler: SamplerConfig) -> None:
    """Refuse settings of classifier-free guidance, for a model without it.

    Raises:
        ValueError: naming the setting.
    """
    interval, negative = sampler.guidance_interval, sampler.negative_prompt
    made = (
        (interval, f"sampler.guidance_interval = {interval} leaves out"),
        (negative, f"sampler.negative_prompt = {negative!r} changes"),
    )
    for value, does in made:
        if value not in (None, ""):
            raise ValueError(
                f"{does} the prediction without the prompt, and this model makes none: the "
                "guidance scale is an input of its network; leave it out"
            )
