"""A model of three numbers in float64, for identities that hold to rounding."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from sfumato.config import SamplerConfig
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.process import (
    DiffusionProcess,
    Prediction,
    PredictionType,
    RectifiedFlow,
    Time,
    VariancePreserving,
)
from sfumato.diffusion.randomness import Rng
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.model import Conditioning, Framing, Role, TextToImageModel
from sfumato.objectives.objective import Loss, Objective
from sfumato.rewards.reward import Reward, Score

ROWS, WIDTH = 6, 3
PROMPTS = [f"prompt {i}" for i in range(ROWS)]


class DoubleRng(Rng):
    """Randomness whose normal numbers are float64."""

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return super().normal(*shape, device=device).double()


def table(*, noisy: bool = False) -> VariancePreserving:
    """A cosine table in float64; `noisy` ends in pure noise."""
    t = torch.arange(1, 101, dtype=torch.float64) / 100 * (1 if noisy else 0.97)
    process = VariancePreserving((t * math.pi / 2).cos() ** 2)
    process._alpha = torch.cat([torch.ones(1), (t * math.pi / 2).cos().clamp(min=0)]).double()
    if noisy:
        process._alpha[-1] = 0
    process._sigma = (1 - process._alpha**2).sqrt()
    return process


CASES: dict[str, tuple[Callable[[], DiffusionProcess], PredictionType]] = {
    "flow": (RectifiedFlow, "flow"),
    "epsilon": (table, "epsilon"),
    "v": (table, "v_prediction"),
    "sample": (table, "sample"),
}


def small_network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH + 1, 16), nn.Tanh(), nn.Linear(16, WIDTH)).double()


@final
class VectorModel(TextToImageModel):
    """A policy a little beside its reference; "images" are the latents themselves."""

    def __init__(
        self,
        process: DiffusionProcess,
        prediction_type: PredictionType,
        make: Callable[[], nn.Module] = small_network,
        spread: float = 0.05,
    ) -> None:
        self.process, self.prediction_type = process, prediction_type
        self.trained, self.reference = make(), make().requires_grad_(False)
        with torch.no_grad():
            for parameter in self.trained.parameters():
                parameter += spread * torch.randn_like(parameter)
        self.has_cfg, self.trains_text = False, False
        self.records = False
        self.calls: list[tuple[Role, float, bool]] = []
        self.asked: list[tuple[Role, Time]] = []  # beside `calls`, with a time of each row

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> None: ...

    def networks(self) -> dict[str, nn.Module]:
        return {"policy": self.trained, "reference": self.reference}

    def image_size(self) -> tuple[int, int]:
        return (1, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (WIDTH, 1, 1)

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        return [1 - i / num_inference_steps for i in range(num_inference_steps + 1)]

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        role: Role = "policy",
        framing: Sequence[Framing] | None = None,
    ) -> Conditioning:
        return Conditioning({"states": torch.zeros(len(prompts), 1, dtype=torch.float64)})

    def encode_moments(self, images: Tensor) -> Tensor:
        return images

    def draw_latents(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        network = self.trained if role == "policy" else self.reference

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            rows = x_t.flatten(1)
            times = (
                t[:, None].to(rows) if isinstance(t, Tensor) else torch.full_like(rows[:, :1], t)
            )
            assert not isinstance(t, Tensor) or len(t) == len(cond)
            self.calls.append((role, float(times[0]), torch.is_grad_enabled()))
            self.asked.append((role, t))
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and (role == "policy" or self.records)
            ):
                raw = network(torch.cat([rows, times], 1))
            return self.process.read(self.prediction_type, raw.reshape(x_t.shape), x_t, t)

        return denoise

    @contextmanager
    def playing(self, role: Role) -> Iterator[None]:
        self.records = True
        yield
        self.records = False

    def shards(self) -> Sequence[nn.Module]:
        return [self.trained]

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def save_adapter(self, folder: Path) -> None:
        raise NotImplementedError

    def image_elsewhere(
        self, exported: Path, name: str, prompt: str, noise: Tensor, sampler: SamplerConfig
    ) -> Tensor:
        raise NotImplementedError


@final
class Curved(Reward):
    """A reward with curvature."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        x = images.flatten(1)
        direction = torch.linspace(-1, 1.5, x.shape[1], dtype=x.dtype)
        return Score(torch.tanh(x) @ direction + 0.3 * x.square().sum(1))


def differentiate(
    objective: Objective[Any],
    model: VectorModel,
    seed: int = 3,
    rows: Sequence[Any] | None = None,
) -> tuple[Tensor, Loss]:
    """Return the gradient of an objective's pieces, in one vector, and their summed loss."""
    model.trained.zero_grad()
    rng = DoubleRng.of_step(seed, 0, range(ROWS))
    rng = DoubleRng([seed + i for i in range(ROWS)], seed)
    total = None
    for piece in objective.pieces(model, rows or PROMPTS, rng):
        loss = piece()
        loss.value.backward()
        total = loss if total is None else total + loss
    assert total is not None
    return vector(model), total


def vector(model: VectorModel) -> Tensor:
    grads = [p.grad for p in model.trained.parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None])
