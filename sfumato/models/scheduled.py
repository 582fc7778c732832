"""Sampling by scheduler classes of diffusers: for pictures, without gradients or densities."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.limits import check_scheduler_class
from sfumato.models.schedules import flow_times


@dataclass(frozen=True)
class Scheduled:
    """A scheduler of diffusers, set to its steps.

    Attributes:
        times: of each call of the network, and 0 at the end.
    """

    scheduler: Any
    times: Sequence[float]

    @staticmethod
    def of(name: str, released: Any, steps: int, tokens: int | None, *, even: bool) -> "Scheduled":
        """Return a scheduler with a released one's settings; no tokens: of a table of steps."""
        import diffusers.schedulers

        check_scheduler_class(name, is_flow=tokens is not None)
        settings, kind = released.config, getattr(diffusers.schedulers, name)
        if tokens is None:
            scheduler, first = kind.from_config(settings), 1
            scheduler.set_timesteps(steps)
        else:
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            scheduler = kind.from_config(settings, **flow, flow_shift=settings["shift"])
            flow_times(scheduler, steps, tokens, even=even)
            first = 0
        table = settings["num_train_timesteps"]
        return Scheduled(
            scheduler, [*((float(t) + first) / table for t in scheduler.timesteps), 0.0]
        )

    def sample(
        self, denoiser: Denoiser, noise: Float[Tensor, "b *d"], rng: Rng
    ) -> Float[Tensor, "b *d"]:
        """Step from noise to data; a class that draws noise draws from the stream of each row."""
        scheduler = self.scheduler
        draws = "generator" in signature(scheduler.step).parameters
        drawn = {"generator": rng.generators} if draws else {}
        x = noise * scheduler.init_noise_sigma
        for step, t in zip(scheduler.timesteps, self.times, strict=False):
            said = denoiser(scheduler.scale_model_input(x, step), t)
            x = scheduler.step(said.raw, step, x, **drawn, return_dict=False)[0]
        return x
