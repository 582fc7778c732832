"""Supervised fine-tuning as one writes it by hand with torch, diffusers and peft, for two families.

It shares no code with Sfumato, and does the same arithmetic: images through the autoencoder,
prompts through the text encoders, noise at a random time, the mean squared error of what the
network predicts, AdamW, EMA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bare_loop import LAYERS, Update, add_lora
from torch import Tensor

MMDIT_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
MMDIT_LAYERS += ["to_add_out", "net.0.proj", "net.2"]
T5_TOKENS = 256  # zeros, where a release has no T5


@dataclass(frozen=True)
class SftSettings:
    """What the loop needs to know."""

    pipeline: Path
    device: torch.device
    dtype: torch.dtype  # of frozen weights, and of autocast if it is not float32
    full: bool  # all weights; else LoRA
    rank: int
    gradient_checkpointing: bool
    lr: float
    max_grad_norm: float
    ema_decay: float


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step: the autoencoder's draw, the noise, and where t lies in [0, 1).

    The first two have the shape of the latents, the third one number per row.
    """

    posterior: Tensor
    noise: Tensor
    u: Tensor


class BareSft:
    """The networks, the optimiser, and a step on images in [-1, 1], (n, 3, H, W), with captions."""

    def __init__(
        self, settings: SftSettings, images: Tensor, captions: Sequence[str], batch: int
    ) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.settings = settings
        self.is_unet = (settings.pipeline / "unet").is_dir()
        trained = torch.float32 if settings.full else settings.dtype
        pipeline: Any = DiffusionPipeline.from_pretrained(
            settings.pipeline,
            dtype={"default": settings.dtype, "unet": trained, "transformer": trained},
            local_files_only=True,
            **({} if self.is_unet else {"text_encoder_3": None, "tokenizer_3": None}),
        )
        self.parts = pipeline
        self.network = pipeline.unet if self.is_unet else pipeline.transformer
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False).to(settings.device)
        if settings.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        if settings.full:
            self.network.requires_grad_(True)
        else:
            add_lora(self.network, settings.rank, LAYERS if self.is_unet else MMDIT_LAYERS)
        self.update = Update(self.network, settings.lr, settings.max_grad_norm, settings.ema_decay)
        self.images, self.captions, self.batch = images, list(captions), batch
        self.taken = 0

    @property
    def optimizer(self) -> Any:
        return self.update.optimizer

    @property
    def parameters(self) -> dict[str, Any]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def step(self, draws: Draws | None = None) -> float:
        """Take one optimiser step on the next images; return the loss."""
        rows = [(self.taken + i) % len(self.images) for i in range(self.batch)]
        self.taken += self.batch
        images = self.images[rows].to(self.settings.device)
        dtype = self.settings.dtype
        with torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = self.loss(images, [self.captions[i] for i in rows], draws)
        return self.update.step(loss)

    def loss(self, images: Tensor, captions: list[str], draws: Draws | None) -> Tensor:
        vae = self.parts.vae
        with torch.no_grad():
            posterior = vae.encode(images.to(vae.dtype)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            if draws is None:
                rows = torch.rand(len(images), device=mean.device)
                draws = Draws(torch.randn_like(mean), torch.randn_like(mean), rows)
            x0 = mean + std * draws.posterior
            x0 = (x0 - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        predict = self._unet if self.is_unet else self._mmdit
        return F.mse_loss(*predict(x0, draws.noise, draws.u, captions))

    def _unet(
        self, x0: Tensor, noise: Tensor, u: Tensor, captions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return what a U-Net of Stable Diffusion predicts, and what it should."""
        scheduler, dtype = self.parts.scheduler, self.network.dtype
        with torch.no_grad():
            tokens = self._tokens(self.parts.tokenizer, captions)
            states = self.parts.text_encoder(tokens)[0]
        steps = (u * scheduler.config.num_train_timesteps).long()
        x_t = scheduler.add_noise(x0, noise, steps)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(x0, noise, steps)
        raw = self.network(x_t.to(dtype), steps, states.to(dtype)).sample
        return raw.float(), target

    def _mmdit(
        self, x0: Tensor, noise: Tensor, u: Tensor, captions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return what a transformer of Stable Diffusion 3 predicts, and what it should."""
        dtype, t = self.network.dtype, u[:, None, None, None]
        states, pooled = self._encode_mmdit(captions)
        raw = self.network(
            ((1 - t) * x0 + t * noise).to(dtype),
            timestep=u * self.parts.scheduler.config.num_train_timesteps,
            encoder_hidden_states=states.to(dtype),
            pooled_projections=pooled.to(dtype),
        ).sample
        return raw.float(), noise - x0

    @torch.no_grad()
    def _encode_mmdit(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        parts = self.parts
        found = [
            encoder(self._tokens(tokenizer, captions), output_hidden_states=True)
            for tokenizer, encoder in (
                (parts.tokenizer, parts.text_encoder),
                (parts.tokenizer_2, parts.text_encoder_2),
            )
        ]
        clip = torch.cat([out.hidden_states[-2] for out in found], dim=-1)
        width = self.network.config.joint_attention_dim
        clip = F.pad(clip, (0, width - clip.shape[-1]))
        t5 = clip.new_zeros(len(captions), T5_TOKENS, width)
        return torch.cat([clip, t5], dim=1), torch.cat([out[0] for out in found], dim=-1)

    def _tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.settings.device)
