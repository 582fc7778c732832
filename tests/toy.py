"""A text-to-image model and a reward of a few numbers each, for tests of the loop around them."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import save_model
from torch import Tensor, nn

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import Prediction, RectifiedFlow, Time
from sfumato.diffusion.randomness import Rng, derive
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.limits import Limits
from sfumato.models.model import Conditioning, Framing, Role, TextToImageModel
from sfumato.rewards.reward import Reward, Score
from sfumato.run import build, export, run


class ToyNetwork(nn.Module):
    """Two layers over the flattened latents, the prompt and the time."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 4 * 4 + 8 + 1, 16)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(16, 3 * 4 * 4)

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        rows = torch.cat([x.flatten(1), states, t.expand(len(x), 1)], dim=1)
        return self.out(self.dropout(torch.tanh(self.hidden(rows))))


@final
class ToyModel(TextToImageModel):
    """The contract in its smallest form; weights come from torch's global stream, as LoRA's do."""

    def __init__(self, config: ModelConfig) -> None:
        self.process = RectifiedFlow()
        self.prediction_type = "flow"
        self.network = ToyNetwork(float(config.variant or 0))  # the share that is dropped
        self.trained = self.network
        self.has_cfg, self.trains_text, self.records = True, False, False
        self.reference = copy.deepcopy(self.network).eval().requires_grad_(False)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        return Limits(channels=3, factor=1, multiple=1, size=(4, 4))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self.network.to(device)

    def networks(self) -> dict[str, nn.Module]:
        return {"policy": self.network, "reference": self.reference}

    def image_size(self) -> tuple[int, int]:
        return 4, 4

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        return torch.linspace(1, 0, num_inference_steps + 1).tolist()

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        role: Role = "policy",
        framing: Sequence[Framing] | None = None,
    ) -> Conditioning:
        return Conditioning({"states": Rng([derive(prompt) for prompt in prompts]).normal(8)})

    def encode_moments(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b m h w"]:
        return images * 2

    def draw_latents(
        self, moments: Float[Tensor, "b m h w"], noise: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b c h w"]:
        return moments

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return latents / 8 + 0.5

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        network = self.network if role == "policy" else self.reference
        rows = [uncond, cond] if uncond is not None else [cond]
        states = torch.cat([row.tensors["states"] for row in rows])

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            times = t.repeat(len(rows))[:, None] if isinstance(t, Tensor) else torch.tensor(t)
            records = role == "policy" or self.records
            with torch.set_grad_enabled(torch.is_grad_enabled() and records):
                raw = network(torch.cat([x_t] * len(rows)), times, states).float()
            raw = raw.unflatten(1, x_t.shape[1:])
            if len(rows) == 2:
                without, given = raw.chunk(2)
                raw = classifier_free(given, without, guidance_scale, cfg_gradient)
            return self.process.read("flow", raw, x_t, t)

        return denoise

    @contextmanager
    def playing(self, role: Role) -> Iterator[None]:
        self.records = True
        yield
        self.records = False

    def shards(self) -> Sequence[nn.Module]:
        return [self.network.hidden, self.network]

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        save_model(self.network, str(folder / "network.safetensors"))

    def image_elsewhere(
        self, exported: Path, name: str, prompt: str, noise: Tensor, sampler: SamplerConfig
    ) -> Tensor:
        raise ValueError("no other program knows the toy")

    def save_adapter(self, folder: Path) -> None:
        raise ValueError("the toy has no adapter")


def use_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training load the toy, whatever `model.pretrained` says."""
    monkeypatch.setattr(run, "find_family", lambda config, sampler: (ToyModel, Path()))
    for module in (build, export):
        monkeypatch.setattr(module, "load_model", ToyModel)


@final
class PromptReward(Reward):
    """Brightness times a number of the prompt; the chosen fault in the chosen call."""

    scale = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.fault = ""
        self.calls: list[list[str]] = []

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        factors = torch.tensor([float(factor(prompt)) for prompt in prompts])
        value = images.mean((1, 2, 3)) * factors
        if self.armed:
            self.calls.append(list(prompts))
        if self.fault == "value" and len(self.calls) == 2:
            value = value * torch.tensor([math.nan] + [1.0] * (len(prompts) - 1))
        if self.fault == "gradient" and self.armed:
            value = value + (images * 0).sum().sqrt()  # 0, with the derivative inf x 0
        return Score(value)


def factor(prompt: str) -> int:
    return derive(prompt) % 97
