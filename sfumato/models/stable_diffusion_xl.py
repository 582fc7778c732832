"""Stable Diffusion XL: a U-Net conditioned on two text encoders and on the crop of its image."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, Time, VariancePreserving
from sfumato.models.adapters import Roles
from sfumato.models.agreement import Fit, Settings, sum_fit
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout
from sfumato.models.model import Conditioning, Latents
from sfumato.models.pipeline_model import CLIP_ATTENTION, PipelineModel
from sfumato.models.schedules import ddim_of, table_index, table_times
from sfumato.models.stable_diffusion import (
    UNET_BLOCKS,
    UNET_LINEAR,
    UNET_REPEATED,
    UNET_SUPPORTED,
    unet_fits,
    unet_limits,
)
from sfumato.precision import dtype_of


def published_names(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers of a U-Net's attention blocks by the names of Stability AI's code.

    Stability's code numbers blocks consecutively, counting conv_in and the resamplers. With n
    layers per block, layer j of down block i is input block (n + 1) i + j + 1; layer j of up
    block i is output block (n + 1) i + j.
    """
    layers = 1 + sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name)) for name in names)
    published = {}
    for name in names:
        if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
            published[f"middle_block.1.{match[1]}"] = (name,)
        elif match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name):
            side, start = ("input", 1) if match[1] == "down" else ("output", 0)
            block = layers * int(match[2]) + int(match[3]) + start
            published[f"{side}_blocks.{block}.1.{match[4]}"] = (name,)
    return published


@final
class StableDiffusionXL(PipelineModel):
    """The networks of a StableDiffusionXLPipeline.

    States of the empty prompt, which guidance leads away from where no negative one is given, are
    zeros if model_index.json sets `force_zeros_for_empty_prompt`, as the release does and as the
    pipeline then does.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    network_name = "unet"
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    classes: ClassVar = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
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
    blocks = UNET_BLOCKS
    supported: ClassVar = {**UNET_SUPPORTED, "addition_embed_type": ("text_time",)}
    repeated = UNET_REPEATED
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

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        return unet_limits(folder, smallest=8)  # which the pipeline asks for

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        yield from unet_fits(settings)
        unet = settings["unet"]
        width = unet.get("cross_attention_dim")
        yield sum_fit(settings, "cross_attention_dim in unet", width, "hidden_size", cls.encoders)
        pooled, side = (
            unet.get("projection_class_embeddings_input_dim"),
            unet.get("addition_time_embed_dim"),
        )
        name = "projection_class_embeddings_input_dim in unet, less 6 addition_time_embed_dim,"
        if pooled is not None and side is not None:
            pooled -= 6 * side  # six sides of framing
        yield sum_fit(settings, name, pooled, "projection_dim", ["text_encoder_2"])

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return table_times(self._table, self.scheduler, num_inference_steps)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        # The network reads the pooled prompt beside six embedded sides of framing.
        framing = 6 * settings["addition_time_embed_dim"]
        return {
            "states": (self.tokens["text_encoder"], settings["cross_attention_dim"]),
            "pooled": (settings["projection_class_embeddings_input_dim"] - framing,),
            "framing": (4,),
        }

    def encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(prompts, None, self.device, 1, False)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
            states = states.masked_fill(empty[:, None, None], 0.0)
            pooled = pooled.masked_fill(empty[:, None], 0.0)
        unknown = torch.zeros(len(prompts), 4, device=states.device)
        return Conditioning({"states": states, "pooled": pooled, "framing": unknown})

    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        dtype, prompts = dtype_of(network), cond.tensors
        height, width = (side * self.limits.factor for side in x_t.shape[2:])
        added = {
            "text_embeds": prompts["pooled"].to(dtype),
            "time_ids": _time_ids(prompts["framing"], height, width),
        }
        timestep = table_index(self._table, t, x_t.device)
        return network(
            x_t.to(dtype), timestep, prompts["states"].to(dtype), added_cond_kwargs=added
        ).sample.float()


def _freeze_unread(encoder: Any) -> None:
    """Freeze the layers after the penultimate states: nothing reads them, and DDP would wait."""
    unread = f"layers.{encoder.config.num_hidden_layers - 1}."
    for name, parameter in encoder.named_parameters():
        if unread in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


def _time_ids(framing: Float[Tensor, "b 4"], height: int, width: int) -> Float[Tensor, "b 6"]:
    """Return original size, crop and target size; an unknown original is the target, uncropped."""
    target = torch.cat([framing.new_full((len(framing), 1), side) for side in (height, width)], 1)
    original = framing[:, :2].where(framing[:, :2] > 0, target)
    return torch.cat([original, framing[:, 2:], target], 1)
