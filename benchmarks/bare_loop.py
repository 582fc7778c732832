"""DRaFT+ as one writes it by hand with torch, diffusers and peft: what Sfumato is measured against.

It shares no code with Sfumato, and does the same arithmetic: DDIM without gradient but in the last
step (K = 1), classifier-free guidance, the reward's gradient through the decoder, the KL term
against the frozen network, AdamW, EMA.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class BareSettings:
    """What the loop needs to know."""

    pipeline: Path
    reward: Path | None  # a CLIP folder; None is 20 x (red - the mean of green and blue)
    device: torch.device
    dtype: torch.dtype  # of frozen weights, and of autocast if it is not float32
    full: bool  # all weights; else LoRA
    rank: int
    gradient_checkpointing: bool
    num_inference_steps: int
    guidance_scale: float
    kl_coeff: float
    lr: float
    max_grad_norm: float
    ema_decay: float


class Update:
    """AdamW with clipped gradients, and the moving average of what is trained."""

    def __init__(self, network: Any, lr: float, max_grad_norm: float, ema_decay: float) -> None:
        self.trained: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0, fused=True)
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.shadow = [parameter.detach().clone() for parameter in self.trained]
        self.updates = 0

    def step(self, loss: Tensor) -> float:
        """Take one optimiser step; return the loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.shadow, self.trained, 1 - decay)  # pyright: ignore


def add_lora(network: Any, rank: int, layers: list[str]) -> None:
    """Add adapters, in float32, to the layers whose names end so."""
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class BareLoop:
    """The networks, the optimiser, and a step."""

    def __init__(self, settings: BareSettings) -> None:
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
            StableDiffusionPipeline,
        )

        self.settings = settings
        pipeline: Any = StableDiffusionPipeline.from_pretrained(
            settings.pipeline,
            dtype={
                "default": settings.dtype,
                "unet": torch.float32 if settings.full else settings.dtype,
            },
            local_files_only=True,
        )
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.eval().requires_grad_(False)
        if settings.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        self.vae, self.unet = pipeline.vae.to(settings.device), pipeline.unet
        self.text_encoder = pipeline.text_encoder.to(settings.device)
        self.tokenizer = pipeline.tokenizer
        self.reference: Any = None
        if settings.full:
            self.reference = copy.deepcopy(self.unet).to(settings.device)
            self.unet.requires_grad_(True)
        else:
            add_lora(self.unet, settings.rank, LAYERS)
        self.unet.to(settings.device)
        self.update = Update(self.unet, settings.lr, settings.max_grad_norm, settings.ema_decay)
        pipeline.scheduler.set_timesteps(settings.num_inference_steps)
        self.timesteps: Tensor = pipeline.scheduler.timesteps.to(settings.device)
        self.predicts_v = pipeline.scheduler.config.prediction_type == "v_prediction"
        indices = pipeline.scheduler.timesteps.tolist()
        self.alphas = [pipeline.scheduler.alphas_cumprod[i].item() for i in [*indices, 0]]
        self.uncond = self._encode([""])
        if settings.reward is not None:
            self._load_clip(settings.reward)

    def _load_clip(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        clip: Any = CLIPModel.from_pretrained(folder)
        self.clip_scale = clip.logit_scale.exp().item()  # bfloat16 would round it
        self.clip = clip.to(self.settings.device, self.settings.dtype)
        self.clip.eval().requires_grad_(False)
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(folder)
        shape = (3, 1, 1)
        self.clip_mean = torch.tensor(CLIP_MEAN, device=self.settings.device).view(shape)
        self.clip_std = torch.tensor(CLIP_STD, device=self.settings.device).view(shape)

    def step(self, prompts: list[str], noise: Tensor) -> float:
        """Take one optimiser step on a batch; return the loss."""
        with self._autocast():
            loss = self.loss(prompts, noise)
        return self.update.step(loss)

    def loss(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Return -reward + kl_coeff kl of a batch; `noise` is what sampling starts from."""
        states = torch.cat([self.uncond.expand(len(prompts), -1, -1), self._encode(prompts)])
        last = len(self.timesteps) - 1
        x = noise
        with torch.no_grad():
            for i in range(last):
                x0, noise = self._predict(self.unet, x, i, states)
                after = self.alphas[i + 1]
                x = after**0.5 * x0 + (1 - after) ** 0.5 * noise
        x0, noise = self._predict(self.unet, x, last, states)
        latents = (x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = ((self.vae.decode(latents).sample.float() + 1) / 2).clamp(0, 1)
        reward = self._reward(images, prompts).mean()
        kl = (noise - self._predict_reference(x, last, states)[1]).square().mean()
        return -reward + self.settings.kl_coeff * kl

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.dtype
        return torch.autocast(
            self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32
        )

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.settings.device)
        return self.text_encoder(tokens.input_ids)[0]

    def _predict(self, unet: Any, x: Tensor, i: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 and noise."""
        rows = torch.cat([x, x]).to(self.settings.dtype)
        raw = unet(rows, self.timesteps[i], states).sample.float()
        without, given = raw.chunk(2)
        raw = without + self.settings.guidance_scale * (given - without)
        alpha, sigma = self.alphas[i] ** 0.5, (1 - self.alphas[i]) ** 0.5
        if self.predicts_v:
            return alpha * x - sigma * raw, sigma * x + alpha * raw
        return (x - sigma * raw) / alpha, raw

    @torch.no_grad()
    def _predict_reference(self, x: Tensor, i: int, states: Tensor) -> tuple[Tensor, Tensor]:
        if self.reference is not None:
            return self._predict(self.reference, x, i, states)
        self.unet.disable_adapters()
        predicted = self._predict(self.unet, x, i, states)
        self.unet.enable_adapters()
        return predicted

    def _reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.settings.reward is None:
            red, green, blue = images.mean((2, 3)).unbind(1)
            return 20 * (red - (green + blue) / 2)
        side = self.clip.config.vision_config.image_size
        pixels = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        pixels = (pixels - self.clip_mean) / self.clip_std
        tokens = self.clip_tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            text = self.clip.text_model(**tokens.to(self.settings.device)).pooler_output
            text = F.normalize(self.clip.text_projection(text).float(), dim=1)
        image = self.clip.vision_model(pixels.to(self.settings.dtype)).pooler_output
        image = F.normalize(self.clip.visual_projection(image).float(), dim=1)
        return self.clip_scale * (image * text).sum(1)
