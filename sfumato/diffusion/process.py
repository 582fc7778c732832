"""The forward process and its deterministic or stochastic reversal, for every kind of prediction.

    x_t = alpha(t) x0 + sigma(t) noise                       t in [0, 1], 1 is noise
    x_s = alpha(s) x0 + sqrt(sigma(s)^2 - std^2) noise + std z
    std = eta sigma(s) sqrt(1 - (alpha(t) sigma(s) / (alpha(s) sigma(t)))^2)

With eta = 0 this is DDIM (arXiv 2010.02502, eq. 12) where alpha^2 + sigma^2 = 1, and an Euler step
where alpha = 1 - t, sigma = t.
"""

import abc
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow"]
Time: TypeAlias = float | Float[Tensor, " b"]  # one for the batch, or one per row


@dataclass(frozen=True)
class Prediction:
    """What a network says about x_t, in the three forms anybody asks for."""

    x0: Float[Tensor, "b *d"]
    noise: Float[Tensor, "b *d"]
    raw: Float[Tensor, "b *d"]  # the network's own output

    def lerp(self, other: "Prediction", weight: float) -> "Prediction":
        """Return self + weight (other - self), form by form; both must be read at one x_t."""
        return Prediction(
            self.x0 + weight * (other.x0 - self.x0),
            self.noise + weight * (other.noise - self.noise),
            self.raw + weight * (other.raw - self.raw),
        )


class DiffusionProcess(abc.ABC):
    """A Gaussian path from data (t = 0) to noise (t = 1), given by alpha(t) and sigma(t).

    Attributes:
        has_free_times: whether a network may be asked at every t, or at those of a table only.
    """

    has_free_times: bool

    @abc.abstractmethod
    def alpha(self, t: Time) -> Float[Tensor, "..."]:
        """Return the scale of the data at t: a scalar, or shape (b,) for one t per row."""

    @abc.abstractmethod
    def sigma(self, t: Time) -> Float[Tensor, "..."]:
        """Return the scale of the noise at t: a scalar, or shape (b,) for one t per row."""

    @abc.abstractmethod
    def on_grid(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return the times that numbers of [0, 1) stand for: uniform ones give uniform times."""

    def _scales(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        if alpha.ndim == 0:  # scalars stay on the CPU in float64, where they promote nothing
            return alpha, sigma
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.to(like).reshape(shape), sigma.to(like).reshape(shape)

    def add_noise(
        self, x0: Float[Tensor, "b *d"], noise: Float[Tensor, "b *d"], t: Time
    ) -> Float[Tensor, "b *d"]:
        """Return x_t = alpha(t) x0 + sigma(t) noise."""
        alpha, sigma = self._scales(t, x0)
        return alpha * x0 + sigma * noise

    def target(
        self,
        prediction_type: PredictionType,
        x0: Float[Tensor, "b *d"],
        noise: Float[Tensor, "b *d"],
        t: Time,
    ) -> Float[Tensor, "b *d"]:
        """Return what a network of this prediction type regresses."""
        alpha, sigma = self._scales(t, x0)
        match prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":  # arXiv 2202.00512, appendix D
                return alpha * noise - sigma * x0
            case "sample":
                return x0
            case "flow":  # arXiv 2210.02747
                return noise - x0

    def read(
        self,
        prediction_type: PredictionType,
        raw: Float[Tensor, "b *d"],
        x_t: Float[Tensor, "b *d"],
        t: Time,
    ) -> Prediction:
        """Read a network's output at x_t as (x0, noise): the inverse of `target`."""
        alpha, sigma = self._scales(t, x_t)
        match prediction_type:
            case "epsilon":
                return Prediction((x_t - sigma * raw) / alpha, raw, raw)
            case "v_prediction":
                scale = alpha**2 + sigma**2
                return Prediction(
                    (alpha * x_t - sigma * raw) / scale, (sigma * x_t + alpha * raw) / scale, raw
                )
            case "sample":
                return Prediction(raw, (x_t - alpha * raw) / sigma, raw)
            case "flow":
                scale = alpha + sigma
                return Prediction((x_t - sigma * raw) / scale, (x_t + alpha * raw) / scale, raw)

    def transition(
        self, prediction: Prediction, t: float, s: float, *, eta: float = 0.0
    ) -> tuple[Float[Tensor, "b *d"], float]:
        """Return mean and standard deviation of p(x_s | x_t) for s < t.

        Args:
            prediction: the reading of x_t.
            eta: 0 is deterministic; 1 is ancestral sampling (DDPM).
        """
        alpha_s, sigma_s = float(self.alpha(s)), float(self.sigma(s))
        std = self.std(t, s, eta)
        kept = math.sqrt(max(0.0, sigma_s**2 - std**2))
        return alpha_s * prediction.x0 + kept * prediction.noise, std

    def std(self, t: float, s: float, eta: float) -> float:
        """Return the standard deviation of p(x_s | x_t) for s < t."""
        if eta == 0:
            return 0.0
        alpha_t, sigma_t = float(self.alpha(t)), float(self.sigma(t))
        alpha_s, sigma_s = float(self.alpha(s)), float(self.sigma(s))
        ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
        return eta * sigma_s * math.sqrt(max(0.0, 1 - ratio**2))

    def step(
        self,
        prediction: Prediction,
        t: float,
        s: float,
        *,
        eta: float = 0.0,
        z: Float[Tensor, "b *d"] | None = None,
    ) -> Float[Tensor, "b *d"]:
        """Return x_s from the reading of x_t; `z` is standard normal, needed where eta > 0.

        Raises:
            ValueError: if eta > 0 and no z is given.
        """
        mean, std = self.transition(prediction, t, s, eta=eta)
        if std == 0.0:
            return mean
        if z is None:
            raise ValueError(
                f"eta = {eta} makes the step stochastic: pass z, standard normal noise"
            )
        return mean + std * z


def mean_log_density(
    x: Float[Tensor, "b *d"], mean: Float[Tensor, "b *d"], std: float
) -> Float[Tensor, " b"]:
    """Return the log-density of x under N(mean, std^2) over the number of elements, by row."""
    distance = ((x - mean) / std).square().flatten(1).mean(1)
    return -0.5 * distance - math.log(std) - 0.5 * math.log(2 * math.pi)


@final
class VariancePreserving(DiffusionProcess):
    """A trained table of cumulative alphas: index i of N is t = (i + 1) / N, and t = 0 is data.

    Args:
        alphas_cumprod: alpha^2 per training step, decreasing, shape (N,).
    """

    has_free_times = False

    def __init__(self, alphas_cumprod: Float[Tensor, " n"]) -> None:
        table = torch.cat([torch.ones(1), alphas_cumprod.detach().cpu()]).double()
        self._alpha, self._sigma = table.sqrt(), (1 - table).sqrt()
        self.num_train_timesteps = len(alphas_cumprod)

    def index(self, t: Time) -> int | Tensor:
        """Return the training step, 0 to N - 1, that t stands for; -1 is clean data."""
        if isinstance(t, Tensor):
            return (t * self.num_train_timesteps).round().long() - 1
        return round(t * self.num_train_timesteps) - 1

    def on_grid(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        steps = self.num_train_timesteps
        return ((u * steps).floor().clamp(0, steps - 1) + 1) / steps

    def time(self, index: int) -> float:
        """Return the t of a training step."""
        return (index + 1) / self.num_train_timesteps

    def _look_up(self, table: Tensor, t: Time) -> Tensor:
        if not isinstance(t, Tensor):
            return table[round(t * self.num_train_timesteps)]
        rows = (t * self.num_train_timesteps).round().long()
        return table.to(t.device)[rows].to(t.dtype)

    def alpha(self, t: Time) -> Float[Tensor, "..."]:
        return self._look_up(self._alpha, t)

    def sigma(self, t: Time) -> Float[Tensor, "..."]:
        return self._look_up(self._sigma, t)


@final
class RectifiedFlow(DiffusionProcess):
    """The straight path: alpha = 1 - t, sigma = t (arXiv 2209.03003)."""

    has_free_times = True

    def on_grid(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return u

    def alpha(self, t: Time) -> Float[Tensor, "..."]:
        return 1 - torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)

    def sigma(self, t: Time) -> Float[Tensor, "..."]:
        return torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
