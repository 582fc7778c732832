"""AdamW and its schedule of learning rates."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from sfumato.config import OptimizerConfig


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Return AdamW over the parameters, with the fused update."""
    first, second = config.betas
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Return the rate of optimiser step `step`, counted from 0.

    It rises linearly over `warmup_steps`, then stays (`constant`) or falls to 0 at `max_steps`
    (`linear`, `cosine`). It depends only on the step, so nothing needs to be saved.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    match config.schedule:
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr
