"""Flux: a transformer over packed latents, conditioned on T5 states and CLIP's pooled prompt.

FLUX.1-dev is distilled from guidance and takes the scale as an input. For a transformer without
this input (FLUX.1-schnell, undistilled models) a scale above 1 is classifier-free guidance.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models.adapters import Roles
from sfumato.models.agreement import Fit, Settings, sum_fit
from sfumato.models.autoencoder_kl import downsampling
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout, by_block
from sfumato.models.model import Conditioning, Latents
from sfumato.models.pipeline_model import CLIP_ATTENTION, PipelineModel
from sfumato.models.schedules import flow_times
from sfumato.precision import dtype_of

LATENT_SIDE = 128  # of the pipeline's default image

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
    """The networks of a FluxPipeline."""

    pipeline_name = "FluxPipeline"
    network_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    classes: ClassVar = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5Tokenizer",
    }
    token_limits: ClassVar = {"text_encoder_2": 512}  # the pipeline's, or the tokenizer's if less
    unused: ClassVar = {"image_encoder": None, "feature_extractor": None}
    schedulers = "FlowMatchEulerDiscreteScheduler"
    lora_targets: ClassVar = {"transformer": LINEAR, "text_encoder": CLIP_ATTENTION}
    kohya = KohyaLayout(
        {"transformer": "lora_unet", "text_encoder": "lora_te1"}, by_block(PUBLISHED)
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")
    repeated = frozenset({"FluxTransformerBlock", "FluxSingleTransformerBlock"})
    process = RectifiedFlow()
    prediction_type: PredictionType = "flow"

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        self.has_cfg = self.limits.has_cfg

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        transformer = read_json(folder / "transformer" / "config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        return Limits(
            channels=transformer.get("in_channels", 64) // 4,
            factor=factor,
            multiple=2 * factor,
            size=(LATENT_SIDE * factor, LATENT_SIDE * factor),
            has_cfg=not transformer.get("guidance_embeds", False),
        )

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        network, channels = settings["transformer"], settings["vae"].get("latent_channels")
        packed = None if channels is None else 4 * channels
        read, written = network.get("in_channels"), network.get("out_channels")
        yield "in_channels in transformer", read, "4 latent_channels in vae", packed
        yield "out_channels in transformer", written, "in_channels there", read
        width, pooled = network.get("joint_attention_dim"), network.get("pooled_projection_dim")
        yield sum_fit(settings, "joint_attention_dim", width, "d_model", ["text_encoder_2"])
        yield sum_fit(settings, "pooled_projection_dim", pooled, "hidden_size", ["text_encoder"])

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return flow_times(self.scheduler, num_inference_steps, tokens, even=True)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {
            "states": (self.tokens["text_encoder_2"], settings["joint_attention_dim"]),
            "pooled": (settings["pooled_projection_dim"],),
        }

    def encode(self, prompts: list[str]) -> Conditioning:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.tokens["text_encoder_2"]
        )
        return Conditioning({"states": states, "pooled": pooled})

    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        dtype, states = dtype_of(network), cond.tensors["states"]
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        positions = image_ids(height, width, x_t.device)
        tokens = network(
            pack(x_t).to(dtype),
            encoder_hidden_states=states.to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
            timestep=rows_of(t, x_t),
            guidance=None if self.has_cfg else rows_of(guidance_scale, x_t),
            img_ids=positions,
            txt_ids=positions.new_zeros(states.shape[1], 3),
        ).sample
        return unpack(tokens.float(), height, width)

    def pipeline_arguments(
        self, noise: Latents, guidance_scale: float, negative_prompt: str | None = None
    ) -> dict[str, Any]:
        shared = {
            "latents": pack(noise),
            "max_sequence_length": self.tokens["text_encoder_2"],
        }
        if not self.has_cfg:
            return shared | {"guidance_scale": guidance_scale}
        negative = [negative_prompt or ""] * len(noise)
        return shared | {"true_cfg_scale": guidance_scale, "negative_prompt": negative}


def pack(x: Latents) -> Float[Tensor, "b n d"]:
    """Return a transformer's tokens: 2 x 2 latents each, row by row, d = 4 c."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Float[Tensor, "b n d"], height: int, width: int) -> Latents:
    """Return the latents of height x width tokens: the inverse of `pack`."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def rows_of(value: Time, like: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """Return one value per row of `like`; a number becomes a tensor without a copy."""
    if isinstance(value, Tensor):
        return value.expand(len(like))
    return torch.full((len(like),), value, device=like.device)


def image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "n 3"]:
    """Return each token's position for the rotary embedding: 0, its row, its column."""
    sides = (torch.arange(n, device=device, dtype=torch.float32) for n in (1, height, width))
    return torch.cartesian_prod(*sides)
