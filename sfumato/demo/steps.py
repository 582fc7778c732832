"""What the demo's training recipes share: a schedule, an update, a line of progress, scenes."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sfumato.demo.world import Scene, partial, random_scene


@dataclass(frozen=True)
class Progress:
    """Prints a line now and then, so that a long stage is seen to be alive."""

    stage: str
    steps: int
    started: float

    def show(self, step: int, **figures: float) -> None:
        if step % 50 == 0 or step == self.steps:
            seconds = time.monotonic() - self.started
            text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"{self.stage} {step}/{self.steps} {text} {seconds:.0f}s", flush=True)


def counted(stage: str, steps: int, first: int = 0) -> Iterator[tuple[int, Callable[..., None]]]:
    """Yield each step after `first`, counted from 1, with a function that shows its figures."""
    progress = Progress(stage, steps, time.monotonic())
    for step in range(first + 1, steps + 1):
        yield step, lambda step=step, **figures: progress.show(step, **figures)


class Update:
    """The optimizers of one training under a cosine schedule; called with a loss, takes a step."""

    def __init__(self, *optimizers: torch.optim.Optimizer, steps: int, warmup: int = 100) -> None:
        def factor(step: int) -> float:
            ramp = min(1.0, (step + 1) / warmup)
            return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

        self.parts = [*optimizers, *(LambdaLR(optimizer, factor) for optimizer in optimizers)]
        self.optimizers = optimizers

    def __call__(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def muon_and_adamw(networks: Sequence[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of linear layers, AdamW for everything else.

    Words that matter little to the loss at first (shapes, places) are learned several times sooner
    than by AdamW alone, because Muon steps equally far in every direction of a matrix.
    """
    linear = [m.weight for network in networks for m in network.modules() if type(m) is nn.Linear]
    matrices = set(linear)
    rest = [p for network in networks for p in network.parameters() if p not in matrices]
    muon = torch.optim.Muon(linear, 2 * lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr, weight_decay=0.0)]


def draw_scenes(rng: random.Random, count: int) -> list[Scene]:
    return [random_scene(rng) for _ in range(count)]


def prompt_of(scene: Scene, rng: random.Random) -> Scene:
    """Leave attributes open: half the captions are complete, the others keep a random share."""
    return scene if rng.random() < 0.5 else partial(scene, rng, keep=rng.random())
