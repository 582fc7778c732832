"""What the demo's training recipes share: a schedule, an update, a line of progress, scenes."""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> LambdaLR:
    def factor(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup)
        return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return LambdaLR(optimizer, factor)


def update(optimizer: torch.optim.Optimizer, schedule: LambdaLR, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    schedule.step()


def draw_scenes(rng: random.Random, count: int) -> list[Scene]:
    return [random_scene(rng) for _ in range(count)]


def prompt_of(scene: Scene, rng: random.Random) -> Scene:
    """Leave attributes open: half the captions are complete, the others keep each with p = 1/2."""
    return scene if rng.random() < 0.5 else partial(scene, rng)
