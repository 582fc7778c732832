"""Stable Diffusion XL: a U-Net told two text encoders' states and how its image was framed."""

import logging
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, Time, VariancePreserving
from sfumato.models.adapters import Roles
from sfumato.models.autoencoder_kl import (
    decode_kl,
    downsampling,
    full_precision,
    latent_size,
    latents_kl,
    moments_kl,
)
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits, check_steps
from sfumato.models.lora import KohyaLayout
from sfumato.models.model import Conditioning
from sfumato.models.pipeline_files import CLIP_ATTENTION
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.schedules import ddim_of, table_index, table_times
from sfumato.models.stable_diffusion import UNET_LINEAR
from sfumato.models.texts import cut_prompt


def published_names(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers of a U-Net's attention blocks by the names of Stability AI's code.

    There blocks are counted through: with n layers each, input block (n + 1) i + j + 1 is layer j
    of down block i (an output block begins at 0), for conv_in, downsamplers and upsamplers count.
    """
    layers = 1 + sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name)) for name in names)
    found = {}
    for name in names:
        if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
            found[f"middle_block.1.{match[1]}"] = (name,)
        elif match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
            side, start = ("input", 1) if match[1] == "down" else ("output", 0)
            block = layers * int(match[2]) + int(match[3]) + start
            found[f"{side}_blocks.{block}.1.{match[4]}"] = (name,)
    return found


@final
class StableDiffusionXL(PipelineModel):
    """A StableDiffusionXLPipeline's networks behind the contract of TextToImageModel.

    The empty prompt is the unconditional one: where model_index.json sets
    `force_zeros_for_empty_prompt`, as the release does, its states are zeros, which the pipeline
    takes where no negative prompt is given.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    network_name = "unet"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    upcast = ("vae",)
    unused: ClassVar = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    lora_targets: ClassVar = {
        "unet": UNET_LINEAR,
        "text_encoder": CLIP_ATTENTION,
        "text_encoder_2": CLIP_ATTENTION,
    }
    kohya = KohyaLayout(
        {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        published_names,
    )
    has_cfg = True

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        released = pipeline.scheduler.config
        # An Euler step in sigma / alpha is DDIM's, and the release's Euler ends at clean data.
        self.scheduler = ddim_of(
            pipeline.scheduler,
            set_alpha_to_one=released.get("final_sigmas_type") == "zero"
            or released.get("set_alpha_to_one", True),
        )
        self.process = self._table = VariancePreserving(self.scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]
        _freeze_unread(parts["text_encoder"].policy)
        self._warned = False
        # Prompts that are too long are warned about by `encode`, once.
        logging.getLogger("diffusers.pipelines.stable_diffusion_xl").setLevel(logging.ERROR)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        unet = read_json(folder / "unet" / "config.json")
        steps = read_json(folder / "scheduler" / "scheduler_config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        return Limits(
            channels=unet.get("in_channels", 4),
            factor=factor,
            multiple=max(8, factor),  # what the pipeline takes
            size=latent_size(unet.get("sample_size"), factor),
            max_steps=steps.get("num_train_timesteps", 1000),
        )

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        check_steps(num_inference_steps, self.limits)
        return table_times(self._table, self.scheduler, num_inference_steps)

    def encode(self, prompts: list[str]) -> Conditioning:
        tokenizer = self.pipeline.tokenizer
        if not self._warned and (cut := cut_prompt(tokenizer, prompts, tokenizer.model_max_length)):
            self._warned = True
            warnings.warn(cut, stacklevel=3)
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, self.device, 1, False)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0.0)
            pooled = pooled.masked_fill(empty[:, None], 0.0)
        unknown = torch.zeros(len(prompts), 4, device=states.device)
        return Conditioning({"states": states, "pooled": pooled, "framing": unknown})

    def encode_moments(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b m h w"]:
        with full_precision(self.pipeline.vae):
            return moments_kl(self.pipeline.vae, images)

    def draw_latents(
        self, moments: Float[Tensor, "b m h w"], noise: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b c h w"]:
        return latents_kl(self.pipeline.vae, moments, noise)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        with full_precision(self.pipeline.vae):
            return decode_kl(self.pipeline.vae, latents)

    def predict(
        self,
        network: Any,
        x_t: Float[Tensor, "b c h w"],
        t: Time,
        cond: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "b c h w"]:
        dtype, told = network.dtype, cond.tensors
        height, width = (side * self.limits.factor for side in x_t.shape[2:])
        added = {
            "text_embeds": told["pooled"].to(dtype),
            "time_ids": _time_ids(told["framing"], height, width),
        }
        timestep = table_index(self._table, t, x_t.device)
        return network(
            x_t.to(dtype), timestep, told["states"].to(dtype), added_cond_kwargs=added
        ).sample.float()

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def pipeline_arguments(
        self, noise: Float[Tensor, "b c h w"], guidance_scale: float
    ) -> dict[str, Any]:
        return {"latents": noise, "guidance_scale": guidance_scale}


def _freeze_unread(encoder: Any) -> None:
    """Train nothing after the penultimate states: nobody reads it, and DDP would wait for it."""
    unread = f"layers.{encoder.config.num_hidden_layers - 1}."
    for name, parameter in encoder.named_parameters():
        if unread in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


def _time_ids(framing: Float[Tensor, "b 4"], height: int, width: int) -> Float[Tensor, "b 6"]:
    """Return original size, crop and target size; an unknown original is the target, uncropped."""
    target = torch.cat([framing.new_full((len(framing), 1), side) for side in (height, width)], 1)
    original = framing[:, :2].where(framing[:, :2] > 0, target)
    return torch.cat([original, framing[:, 2:], target], 1)
