"""Limits of a model, read from its JSON files before a weight is loaded: sizes, steps, guidance."""

from dataclasses import dataclass


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


def check_steps(num_inference_steps: int, limits: Limits) -> None:
    """Refuse more sampling steps than the model has, or fewer than its settings allow.

    Raises:
        ValueError: naming the setting.
    """
    if num_inference_steps < limits.min_steps:
        raise ValueError(
            f"sampler.num_inference_steps = {num_inference_steps} is too few for this model; take "
            f"{limits.min_steps} or more"
        )
    if limits.max_steps is not None and num_inference_steps > limits.max_steps:
        raise ValueError(
            f"sampler.num_inference_steps = {num_inference_steps} is more than the "
            f"{limits.max_steps} steps that this model was trained on; set {limits.max_steps} or "
            "less"
        )
