"""Parts that the trainings of the demo share: progress lines and the optimizer step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 100  # steps


def counted(stage: str, steps: int) -> Iterator[Callable[..., None]]:
    """Yield, for each step, a function that prints its figures at every 50th step and the last."""
    started = time.monotonic()
    for step in range(1, steps + 1):

        def show(*, step: int = step, **figures: float) -> None:
            if step % 50 == 0 or step == steps:
                text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
                seconds = time.monotonic() - started
                print(f"{stage} {step}/{steps} {text} {seconds:.0f}s", flush=True)

        yield show


class Update:
    """Optimizer step under a cosine schedule with clipped gradients; called with the loss."""

    def __init__(self, *optimizers: torch.optim.Optimizer, steps: int) -> None:
        def factor(step: int) -> float:
            ramp = min(1.0, (step + 1) / WARMUP)
            return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

        self.optimizers = optimizers
        self.schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers]

    def __call__(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()


def muon_and_adamw(networks: Sequence[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of linear layers, AdamW for everything else.

    Words that matter little to the loss at first are learned several times sooner than by AdamW
    alone, because Muon steps equally far in every direction of a matrix.
    """
    linear = [m.weight for network in networks for m in network.modules() if type(m) is nn.Linear]
    matrices = set(linear)
    rest = [p for network in networks for p in network.parameters() if p not in matrices]
    muon = torch.optim.Muon(linear, 2 * lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr, weight_decay=0.0)]
