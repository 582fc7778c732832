"""Stable Diffusion 3 and 3.5: a transformer over latent patches and three encoders' tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models.agreement import Fit, Settings, sum_fit
from sfumato.models.autoencoder_kl import downsampling, latent_size
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout, by_block
from sfumato.models.model import Conditioning, Latents
from sfumato.models.pipeline_model import CLIP_ATTENTION, PipelineModel
from sfumato.models.schedules import flow_times
from sfumato.precision import dtype_of

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
    """The networks of a StableDiffusion3Pipeline.

    The third encoder, T5, may be missing: the pipeline then puts zeros in place of its states.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    network_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    classes: ClassVar = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
    }
    token_limits: ClassVar = {"text_encoder_3": T5_TOKENS}
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
    blocks = ("transformer_blocks",)
    repeated = frozenset({"JointTransformerBlock"})
    process = RectifiedFlow()
    prediction_type: PredictionType = "flow"
    has_cfg = True

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

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        network, latents = settings["transformer"], settings["vae"].get("latent_channels")
        for key in ("in_channels", "out_channels"):
            yield f"{key} in transformer", network.get(key), "latent_channels in vae", latents
        width, pooled = network.get("joint_attention_dim"), network.get("pooled_projection_dim")
        yield sum_fit(settings, "joint_attention_dim", width, "d_model", ["text_encoder_3"])
        clips = ["text_encoder", "text_encoder_2"]
        yield sum_fit(settings, "pooled_projection_dim", pooled, "projection_dim", clips)

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return flow_times(self.scheduler, num_inference_steps, tokens)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tokens = self.tokens["text_encoder"] + T5_TOKENS  # CLIP's and then T5's, or zeros
        return {
            "states": (tokens, settings["joint_attention_dim"]),
            "pooled": (settings["pooled_projection_dim"],),
        }

    def encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, self.device, 1, False, max_sequence_length=T5_TOKENS
        )
        return Conditioning({"states": states, "pooled": pooled})

    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        dtype = dtype_of(network)
        t = t if isinstance(t, Tensor) else torch.full((), t, device=x_t.device)
        return network(
            x_t.to(dtype),
            timestep=(t * self.scheduler.config["num_train_timesteps"]).expand(len(x_t)),
            encoder_hidden_states=cond.tensors["states"].to(dtype),
            pooled_projections=cond.tensors["pooled"].to(dtype),
        ).sample.float()
