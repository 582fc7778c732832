"""Stable Diffusion 1.x and 2.x: a U-Net in latent space, conditioned on one CLIP text encoder."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, Time, VariancePreserving
from sfumato.models.adapters import Roles
from sfumato.models.autoencoder_kl import (
    decode_kl,
    downsampling,
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
from sfumato.models.texts import cut_prompt

UNET_LINEAR = (
    r".*attn\d?\.to_[qkv]",
    r".*attn\d?\.to_out\.0",
    r".*\.ff\.net\.0\.proj",
    r".*\.ff\.net\.2",
)


@final
class StableDiffusion(PipelineModel):
    """A StableDiffusionPipeline's networks behind the contract of TextToImageModel."""

    pipeline_name = "StableDiffusionPipeline"
    network_name = "unet"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    unused: ClassVar = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    lora_targets: ClassVar = {"unet": UNET_LINEAR, "text_encoder": CLIP_ATTENTION}
    kohya = KohyaLayout({"unet": "lora_unet", "text_encoder": "lora_te"})
    has_cfg = True

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        self.scheduler = ddim_of(pipeline.scheduler)
        self.process = self._table = VariancePreserving(self.scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]
        self._warned = False
        # Prompts that are too long are warned about by `encode`, once.
        logging.getLogger("diffusers.pipelines.stable_diffusion").setLevel(logging.ERROR)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        unet = read_json(folder / "unet" / "config.json")
        steps = read_json(folder / "scheduler" / "scheduler_config.json")
        factor = downsampling(read_json(folder / "vae" / "config.json"))
        return Limits(
            channels=unet.get("in_channels", 4),
            factor=factor,
            multiple=factor,
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
        states, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return Conditioning({"states": states})

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
        timestep = table_index(self._table, t, x_t.device)
        return network(x_t.to(dtype), timestep, cond.tensors["states"].to(dtype)).sample.float()

    def blocks(self, network: Any) -> Sequence[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def pipeline_arguments(
        self, noise: Float[Tensor, "b c h w"], guidance_scale: float
    ) -> dict[str, Any]:
        return {"latents": noise, "guidance_scale": guidance_scale}
