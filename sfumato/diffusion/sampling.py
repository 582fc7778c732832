"""The only sampling loop: training, validation, evaluation and inference all run it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.process import DiffusionProcess, Prediction, Time
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.solvers import Solver, extrapolation

Denoiser: TypeAlias = Callable[[Tensor, Time], Prediction]  # conditioning, guidance already inside


@dataclass(frozen=True)
class Reading:
    """Where a denoiser stood and what it said."""

    t: Time
    x_t: Float[Tensor, "b *d"]
    prediction: Prediction


@dataclass(frozen=True)
class Visit(Reading):
    """One step of a sampling run: all rows stand at the same time."""

    t: float

    def kept(self, device: torch.device | str) -> "Visit":
        """Return the step without a graph, in float32 or better, on a device."""

        def kept(part: Tensor) -> Tensor:
            return part.detach().to(device, torch.promote_types(part.dtype, torch.float32))

        said = self.prediction
        return Visit(
            self.t, kept(self.x_t), Prediction(kept(said.x0), kept(said.noise), kept(said.raw))
        )


@dataclass(frozen=True)
class Trajectory:
    """The end of a sampling run, and its steps.

    Attributes:
        window: the steps that carry a gradient.
        visits: all steps without a graph, if they were kept.
    """

    x: Float[Tensor, "b *d"]  # the state at times[-1]: what a pipeline decodes
    x0: Float[Tensor, "b *d"]  # the last prediction of the data: what a reward is computed on
    window: tuple[Visit, ...]
    visits: tuple[Visit, ...] = ()


def sample(
    denoiser: Denoiser,
    process: DiffusionProcess,
    x: Float[Tensor, "b *d"],
    times: Sequence[float],
    *,
    grad_steps: int = 0,
    solver: Solver = "first_order",
    eta: float | Sequence[float] = 0.0,
    rng: Rng | None = None,
    keep: torch.device | str | None = None,
    without_graph: AbstractContextManager[object] | None = None,
) -> Trajectory:
    """Run the reverse process from x at times[0] down to times[-1].

    Args:
        x: starting noise, float32.
        times: T + 1 decreasing times; step i goes from times[i] to times[i + 1].
        grad_steps: only the last K steps record a graph; the others run without one.
        solver: `dpmpp_2m` also reads the x0 of the step before; it is deterministic.
        eta: 0 is DDIM or Euler; above 0 each step adds noise drawn from `rng`. One for all steps,
            or one for each.
        keep: device that holds every step, in float32 and without a graph; None keeps none.
        without_graph: context of the steps before the last K.

    Raises:
        ValueError: if grad_steps is not in 0..T, or eta > 0 comes without rng or with `dpmpp_2m`.
    """
    steps = len(times) - 1
    if not 0 <= grad_steps <= steps:
        raise ValueError(
            f"grad_steps = {grad_steps} must lie between 0 and the {steps} steps taken"
        )
    etas = [eta] * steps if isinstance(eta, float | int) else list(eta)
    if len(etas) != steps:
        raise ValueError(f"{len(etas)} etas are given for {steps} steps; give one for each")
    noisy = max(etas, default=0.0) > 0
    if noisy and rng is None:
        raise ValueError(f"eta = {eta} draws noise at each step: pass rng")
    if noisy and solver != "first_order":
        raise ValueError(
            f"eta = {eta} draws noise, and solver = {solver} is deterministic; set eta to 0, or "
            "use solver = first_order"
        )
    window: list[Visit] = []
    visits: list[Visit] = []
    x0 = x
    with ExitStack() as early:
        if without_graph is not None and grad_steps < steps:
            early.enter_context(without_graph)
        for i, (t, s) in enumerate(pairwise(times)):
            with_grad = i >= steps - grad_steps
            if with_grad:
                early.close()
            with torch.set_grad_enabled(with_grad):
                prediction = denoiser(x, t)
                visit = Visit(t, x, prediction)
                if with_grad:
                    window.append(visit)
                if keep is not None:
                    visits.append(visit.kept(keep))
                z = (
                    rng.normal(*x.shape[1:], device=x.device)
                    if rng is not None and etas[i] > 0
                    else None
                )
                x = process.step(prediction, t, s, eta=etas[i], z=z)
                if solver == "dpmpp_2m" and (weight := extrapolation(process, times, i)):
                    x = x + weight * (prediction.x0 - x0)
                x0 = prediction.x0
    return Trajectory(x, x0, tuple(window), tuple(visits))
