"""A model, an objective and data of one's own under Sfumato's loop: see docs/write_your_own.md.

python examples/write_your_own.py
torchrun --nproc-per-node 2 examples/write_your_own.py name=two
accelerate launch examples/write_your_own.py name=accelerated objective.settings.background=0.1
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.cli import mistakes_explained
from sfumato.compose import compose_train
from sfumato.config import ModelConfig, OwnConfig, SamplerConfig
from sfumato.data.left_out import SkipReport
from sfumato.data.stream import Stream, check_rows
from sfumato.diffusion.guidance import CfgGradient
from sfumato.diffusion.process import Prediction, RectifiedFlow, Time
from sfumato.diffusion.randomness import Rng, derive
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.adapters import CopyRoles
from sfumato.models.model import Conditioning, Framing, Role, TextToImageModel
from sfumato.objectives.objective import Loss, Objective
from sfumato.run.run import Own, train
from sfumato.training.distribution import Distribution

SIDE, WORD = 16, 64  # pixels that the model draws, numbers that a word is to it
COLORS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
PLACES = {"left": -0.4, "right": 0.4}
PROMPTS = [f"a {color} disc on the {place}" for color in COLORS for place in PLACES]
DEFAULTS = f"""
    name=my_run model.pretrained=scratch model.trainable=full verify=false
    objective=own objective.settings.background=0.5
    sampler.height={SIDE} sampler.width={SIDE} sampler.num_inference_steps=10
    optimizer.lr=4e-3 training.micro_batch_size=16 training.global_batch_size=32
    training.max_steps=100 training.ema_decay=0.9 validation.num_images={len(PROMPTS)}
""".split()


class MyNetwork(nn.Module):
    """Two layers that see the noisy picture, the words and the time, and answer a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIDE * SIDE + WORD + 1, 256)
        self.last = nn.Linear(256, 3 * SIDE * SIDE)

    def forward(self, x_t: Tensor, t: Tensor, words: Tensor) -> Tensor:
        seen = torch.cat([x_t.flatten(1), words, t[:, None]], dim=1)
        return self.last(nn.functional.silu(self.first(seen))).unflatten(1, x_t.shape[1:])


@final
class MyModel(TextToImageModel):
    """The network behind the contract. It works on pixels: latents are the images themselves."""

    def __init__(self, config: ModelConfig) -> None:
        if config.trainable != "full":
            raise ValueError(f"model.trainable = {config.trainable}: MyModel is trained in full")
        self.roles = CopyRoles(MyNetwork())  # what is trained, and its frozen self
        self.trained = self.roles.policy
        self.process, self.prediction_type = RectifiedFlow(), "sample"  # the network answers x0
        self.has_cfg, self.trains_text = False, False

    @property
    def device(self) -> torch.device:
        return next(self.trained.parameters()).device

    def to(self, device: torch.device) -> None:
        for network in self.roles.networks():
            network.to(device)

    def networks(self) -> dict[str, nn.Module]:
        return dict(zip(("policy", "reference"), self.roles.networks(), strict=False))

    def image_size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        if (height, width) != (SIDE, SIDE):
            raise ValueError(f"{height} x {width} pixels are not the {SIDE} x {SIDE} of MyModel")
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
        rows = [Rng([derive(word) for word in ["", *prompt.split()]]) for prompt in prompts]
        words = torch.stack([rng.normal(WORD).sum(0) for rng in rows])
        return Conditioning({"words": words.to(self.device)})

    def encode_moments(self, images: Tensor) -> Tensor:
        return images

    def draw_latents(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) / 2

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        def denoise(x_t: Tensor, t: Time) -> Prediction:
            times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
            with self.roles.acting(role) as network:
                raw = network(x_t, times, cond.tensors["words"])
            return self.process.read(self.prediction_type, raw, x_t, t)

        return denoise

    def shards(self) -> Sequence[nn.Module]:
        return self.roles.networks()

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        weights = self.roles.merged().cpu().to(dtype).state_dict()
        save_file(weights, folder / "network.safetensors")

    def save_adapter(self, folder: Path) -> None:
        raise ValueError("MyModel has no adapter")

    def image_elsewhere(
        self, exported: Path, name: str, prompt: str, noise: Tensor, sampler: SamplerConfig
    ) -> Tensor:
        raise ValueError("no other program knows MyModel; give verify=false")


@dataclass(frozen=True)
class Row:
    """One training example."""

    image: Tensor = field(repr=False)  # (3, H, W) in [-1, 1]
    mask: Tensor = field(repr=False)  # (1, H, W) in [0, 1]: what matters
    caption: str


@final
class MyObjective(Objective[Sequence[Row]]):
    """Regress what the network predicts; errors outside the mask weigh less.

    x_t = alpha(t) x0 + sigma(t) noise,   w = background + (1 - background) mask
    loss = mean over rows of sum(w (raw - target)^2) / sum(w)
    """

    def __init__(self, background: float) -> None:
        self.background = background

    def loss(self, model: TextToImageModel, batch: Sequence[Row], rng: Rng) -> Loss:
        x0 = model.encode_images(torch.stack([row.image for row in batch]).to(model.device))
        noise = rng.normal(*x0.shape[1:], device=model.device)
        t = model.process.on_grid(rng.uniform()).to(model.device)
        x_t = model.process.add_noise(x0, noise, t)

        cond = model.encode_prompts([row.caption for row in batch])
        raw = model.denoiser(cond)(x_t, t).raw
        target = model.process.target(model.prediction_type, x0, noise, t)
        error = (raw - target).square()

        mask = torch.stack([row.mask for row in batch]).to(model.device)
        mask = nn.functional.interpolate(mask, size=x0.shape[2:], mode="area")
        w = (self.background + (1 - self.background) * mask).expand_as(error)
        loss = ((w * error).sum((1, 2, 3)) / w.sum((1, 2, 3))).mean()
        return Loss(loss, {"loss": loss.detach(), "mse": error.detach().mean()})


@final
class MyData(Stream[Row]):
    """Discs drawn on the fly: row i is a function of (seed, i), so a place is one number."""

    def __init__(self, height: int, width: int, seed: int) -> None:
        self.size, self.seed, self.position = (height, width), seed, 0

    def next(self, global_batch_size: int, start: int, stop: int) -> list[Row]:
        check_rows(global_batch_size, start, stop)
        first, self.position = self.position, self.position + global_batch_size
        return [self.draw(first + i) for i in range(start, stop)]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]

    @property
    def skipped(self) -> SkipReport:
        return SkipReport()  # nothing that is drawn can be unreadable

    def draw(self, i: int) -> Row:
        rng = Rng([derive(self.seed, "disc", i)])
        caption = PROMPTS[int(rng.uniform() * len(PROMPTS))]
        _, color, *_, place = caption.split()
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in self.size), indexing="ij")
        middle = PLACES[place] + 0.1 * (rng.uniform() - 0.5)
        mask = ((x - middle) ** 2 + y**2 < 0.4**2).float()[None]
        return Row(mask * (torch.tensor(COLORS[color]).view(3, 1, 1) + 1) - 1, mask, caption)


def main() -> None:
    """Train with the defaults above and the settings of the command line."""
    config, settings = compose_train([*DEFAULTS, *sys.argv[1:]])
    assert isinstance(config.objective, OwnConfig)
    unknown = config.objective.settings.keys() - {"background"}
    if unknown:
        raise ValueError(f"objective.settings.{min(unknown)} is unknown; there is background")
    own = Own(
        load=MyModel if config.model.pretrained == "scratch" else None,
        objective=MyObjective(**config.objective.settings),
        stream=MyData(
            config.sampler.height or SIDE, config.sampler.width or SIDE, config.training.seed
        ),
        prompts=PROMPTS,
    )
    distribution = Distribution(config.training)
    try:
        train(config, settings, distribution, own)
    finally:
        distribution.close()


if __name__ == "__main__":
    with mistakes_explained():
        main()
