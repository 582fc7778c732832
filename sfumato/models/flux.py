"""Flux: a transformer over packed latents and T5 states, told CLIP's pooled prompt.

FLUX.1-dev is distilled from guidance and is told the scale; where a transformer has no such
embedding (FLUX.1-schnell, undistilled models), a scale above 1 is classifier-free guidance.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models.adapters import Roles
from sfumato.models.autoencoder_kl import decode_kl, downsampling, latents_kl, moments_kl
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout, by_block
from sfumato.models.model import Conditioning
from sfumato.models.pipeline_files import CLIP_ATTENTION
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.schedules import dynamic_mu, flow_times
from sfumato.models.texts import cut_prompt

LATENT_SIDE = 128  # of an image whose size nobody states, says the pipeline

# The layers of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py
LINEAR = (
    r".*\.attn\.to_[qkv]",
    r".*\.attn\.to_out\.0",
    r".*\.attn\.add_[qkv]_proj",
    r".*\.attn\.to_add_out",
    r".*\.ff(_context)?\.net\.(0\.proj|2)",
)

# The names of Black Forest Labs' code; `linear1` of a single block is q, k, v and MLP in one.
DOUBLE, SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
PUBLISHED = {
    "double_blocks.{}.img_attn.qkv": tuple(f"{DOUBLE}attn.to_{part}" for part in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"{DOUBLE}attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.{}.img_attn.proj": (f"{DOUBLE}attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": (f"{DOUBLE}attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": (f"{DOUBLE}ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{DOUBLE}ff.net.2",),
    "double_blocks.{}.txt_mlp.0": (f"{DOUBLE}ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{DOUBLE}ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": (f"{DOUBLE}norm1.linear",),
    "double_blocks.{}.txt_mod.lin": (f"{DOUBLE}norm1_context.linear",),
    "single_blocks.{}.linear1": (
        *(f"{SINGLE}attn.to_{part}" for part in "qkv"),
        f"{SINGLE}proj_mlp",
    ),
    "single_blocks.{}.linear2": (f"{SINGLE}proj_out",),
    "single_blocks.{}.modulation.lin": (f"{SINGLE}norm.linear",),
}


@final
class Flux(PipelineModel):
    """A FluxPipeline's networks behind the contract of TextToImageModel."""

    pipeline_name = "FluxPipeline"
    network_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    unused: ClassVar = {"image_encoder": None, "feature_extractor": None}
    schedulers = "FlowMatchEulerDiscreteScheduler"
    lora_targets: ClassVar = {"transformer": LINEAR, "text_encoder": CLIP_ATTENTION}
    kohya = KohyaLayout(
        {"transformer": "lora_unet", "text_encoder": "lora_te1"}, by_block(PUBLISHED)
    )
    prediction_type: PredictionType = "flow"

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        self.scheduler = pipeline.scheduler
        self.process = RectifiedFlow()
        settings = read_json(source / "transformer" / "config.json")
        self.has_cfg = not settings.get("guidance_embeds", False)
        # The pipeline takes 512; a model that learned fewer says so with its tokenizer.
        self.max_tokens = min(512, pipeline.tokenizer_2.model_max_length)
        self._warned = False
        # Prompts that are too long for T5 are warned about by `encode`, once; CLIP reads 77 tokens.
        logging.getLogger("diffusers.pipelines.flux").setLevel(logging.ERROR)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        transformer = read_json(folder / "transformer" / "config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        return Limits(
            channels=transformer.get("in_channels", 64) // 4,
            factor=factor,
            multiple=2 * factor,
            size=(LATENT_SIDE * factor, LATENT_SIDE * factor),
        )

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        tokens = (height // self.limits.multiple) * (width // self.limits.multiple)
        return flow_times(
            self.scheduler,
            num_inference_steps,
            mu=dynamic_mu(self.scheduler.config, tokens),
            sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)],
        )

    def encode(self, prompts: list[str]) -> Conditioning:
        tokenizer, limit = self.pipeline.tokenizer_2, self.max_tokens
        if not self._warned and (cut := cut_prompt(tokenizer, prompts, limit)):
            self._warned = True
            warnings.warn(cut, stacklevel=3)
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=limit
        )
        return Conditioning({"states": states, "pooled": pooled})

    def encode_moments(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b m h w"]:
        return moments_kl(self.pipeline.vae, images)

    def draw_latents(
        self, moments: Float[Tensor, "b m h w"], noise: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b c h w"]:
        return latents_kl(self.pipeline.vae, moments, noise)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return decode_kl(self.pipeline.vae, latents)

    def predict(
        self,
        network: Any,
        x_t: Float[Tensor, "b c h w"],
        t: Time,
        cond: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "b c h w"]:
        dtype, states = network.dtype, cond.tensors["states"]
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        places = image_ids(height, width, x_t.device)
        tokens = network(
            pack(x_t).to(dtype),
            encoder_hidden_states=states.to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            timestep=rows_of(t, x_t),
            guidance=None if self.has_cfg else rows_of(guidance_scale, x_t),
            img_ids=places,
            txt_ids=places.new_zeros(states.shape[1], 3),
        ).sample
        return unpack(tokens.float(), height, width)

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def pipeline_arguments(
        self, noise: Float[Tensor, "b c h w"], guidance_scale: float
    ) -> dict[str, Any]:
        given = {"latents": pack(noise), "max_sequence_length": self.max_tokens}
        if not self.has_cfg:
            return given | {"guidance_scale": guidance_scale}
        return given | {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(noise)}


def pack(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """Return the tokens that a transformer sees: 2 x 2 latents each, row by row, d = 4 c."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Return the latents of height x width tokens: the inverse of `pack`."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def rows_of(value: Time, like: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return one value per row of `like`; a number is filled in there, without a copy."""
    if isinstance(value, Tensor):
        return value.expand(len(like))
    return torch.full((len(like),), value, device=like.device)


def image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """Return each token's place for the rotary embedding: 0, its row, its column."""
    sides = (torch.arange(n, device=device, dtype=torch.float32) for n in (1, height, width))
    return torch.cartesian_prod(*sides)
