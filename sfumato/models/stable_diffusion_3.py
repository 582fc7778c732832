"""Stable Diffusion 3 and 3.5: a transformer over latent patches and three encoders' tokens."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models.adapters import Roles
from sfumato.models.autoencoder_kl import (
    decode_kl,
    downsampling,
    latent_size,
    latents_kl,
    moments_kl,
)
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout, by_block
from sfumato.models.model import Conditioning
from sfumato.models.pipeline_files import CLIP_ATTENTION
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.schedules import dynamic_mu, flow_times
from sfumato.models.texts import cut_prompt

T5_TOKENS = 256  # the pipeline's max_sequence_length
MMDIT_LINEAR = (
    r".*attn\d?\.to_[qkv]",
    r".*attn\d?\.to_out\.0",
    r".*attn\.add_[qkv]_proj",
    r".*attn\.to_add_out",
    r".*\.ff(_context)?\.net\.0\.proj",
    r".*\.ff(_context)?\.net\.2",
)

# The names of Stability AI's code.
BLOCK = "transformer_blocks.{}."
PUBLISHED = {
    "joint_blocks.{}.x_block.attn.qkv": tuple(f"{BLOCK}attn.to_{part}" for part in "qkv"),
    "joint_blocks.{}.x_block.attn.proj": (f"{BLOCK}attn.to_out.0",),
    "joint_blocks.{}.x_block.attn2.qkv": tuple(f"{BLOCK}attn2.to_{part}" for part in "qkv"),
    "joint_blocks.{}.x_block.attn2.proj": (f"{BLOCK}attn2.to_out.0",),
    "joint_blocks.{}.x_block.mlp.fc1": (f"{BLOCK}ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": (f"{BLOCK}ff.net.2",),
    "joint_blocks.{}.context_block.attn.qkv": tuple(
        f"{BLOCK}attn.add_{part}_proj" for part in "qkv"
    ),
    "joint_blocks.{}.context_block.attn.proj": (f"{BLOCK}attn.to_add_out",),
    "joint_blocks.{}.context_block.mlp.fc1": (f"{BLOCK}ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": (f"{BLOCK}ff_context.net.2",),
}


@final
class StableDiffusion3(PipelineModel):
    """A StableDiffusion3Pipeline's networks behind the contract of TextToImageModel.

    A release without its third encoder, T5, works: the pipeline puts zeros for T5's states.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    network_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    unused: ClassVar = {"image_encoder": None, "feature_extractor": None}
    schedulers = "FlowMatchEulerDiscreteScheduler"
    lora_targets: ClassVar = {
        "transformer": MMDIT_LINEAR,
        "text_encoder": CLIP_ATTENTION,
        "text_encoder_2": CLIP_ATTENTION,
    }
    kohya = KohyaLayout(
        {
            "transformer": "lora_unet",
            "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2",
        },
        by_block(PUBLISHED),
    )
    has_cfg = True
    prediction_type: PredictionType = "flow"

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        self.scheduler = pipeline.scheduler
        self.process = RectifiedFlow()
        self._warned = False
        # Prompts that are too long are warned about by `encode`, once.
        logging.getLogger("diffusers.pipelines.stable_diffusion_3").setLevel(logging.ERROR)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        transformer = read_json(folder / "transformer" / "config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        multiple = factor * transformer.get("patch_size", 2)
        return Limits(
            channels=transformer.get("in_channels", 16),
            factor=factor,
            multiple=multiple,
            size=latent_size(transformer.get("sample_size", 128), factor),
            largest=transformer.get("pos_embed_max_size", 96) * multiple,
        )

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        tokens = (height // self.limits.multiple) * (width // self.limits.multiple)
        mu = dynamic_mu(self.scheduler.config, tokens)
        return flow_times(self.scheduler, num_inference_steps, mu=mu)

    def encode(self, prompts: list[str]) -> Conditioning:
        if not self._warned and (cut := self._cut(prompts)):
            self._warned = True
            warnings.warn(cut, stacklevel=3)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, 1, False, max_sequence_length=T5_TOKENS
        )
        return Conditioning({"states": states, "pooled": pooled})

    def _cut(self, prompts: list[str]) -> str | None:
        # What CLIP does not read T5 still does.
        if self.pipeline.text_encoder_3 is not None:
            return cut_prompt(self.pipeline.tokenizer_3, prompts, T5_TOKENS)
        return cut_prompt(self.pipeline.tokenizer, prompts, self.pipeline.tokenizer_max_length)

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
        dtype = network.dtype
        t = t if isinstance(t, Tensor) else torch.full((), t, device=x_t.device)
        return network(
            x_t.to(dtype),
            timestep=(t * self.scheduler.config["num_train_timesteps"]).expand(len(x_t)),
            encoder_hidden_states=cond.tensors["states"].to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
        ).sample.float()

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        return list(network.transformer_blocks)

    def pipeline_arguments(
        self, noise: Float[Tensor, "b c h w"], guidance_scale: float
    ) -> dict[str, Any]:
        return {"latents": noise, "guidance_scale": guidance_scale}
