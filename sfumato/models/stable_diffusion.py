"""Stable Diffusion 1.x and 2.x: a U-Net in latent space, conditioned on a CLIP text encoder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

from sfumato.config import ModelConfig
from sfumato.diffusion.process import PredictionType, Time, VariancePreserving
from sfumato.models.adapters import Roles
from sfumato.models.agreement import Fit, Settings, sum_fit
from sfumato.models.autoencoder_kl import downsampling, latent_size
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout
from sfumato.models.model import Conditioning, Latents
from sfumato.models.pipeline_model import CLIP_ATTENTION, PipelineModel
from sfumato.models.schedules import ddim_of, table_index, table_times
from sfumato.precision import dtype_of

UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
UNET_REPEATED = frozenset({"BasicTransformerBlock", "ResnetBlock2D"})
# Other values ask for inputs beside x_t, t and states; `text` reads the states once more.
UNET_SUPPORTED = {
    **dict.fromkeys(("time_cond_proj_dim", "class_embed_type", "num_class_embeds"), (None,)),
    **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type"), (None,)),
    "addition_embed_type": (None, "text"),
    "attention_type": ("default",),
}
UNET_LINEAR = (
    r".*attn\d?\.to_[qkv]",
    r".*attn\d?\.to_out\.0",
    r".*\.ff\.net\.0\.proj",
    r".*\.ff\.net\.2",
)


def unet_limits(folder: Path, *, smallest: int = 1) -> Limits:
    """Return the limits of a U-Net: a latent is `factor` pixels a side, a step one of its table.

    Args:
        smallest: number of pixels that a side must be a multiple of.
    """
    unet = read_json(folder / "unet" / "config.json")
    steps = read_json(folder / "scheduler" / "scheduler_config.json")
    factor = downsampling(read_json(folder / "vae" / "config.json"))
    return Limits(
        channels=unet.get("in_channels", 4),
        factor=factor,
        multiple=max(smallest, factor),
        size=latent_size(unet.get("sample_size"), factor),
        max_steps=steps.get("num_train_timesteps", 1000),
    )


def unet_fits(settings: Mapping[str, Settings]) -> Iterable[Fit]:
    """Return the channels of latents: in the autoencoder, and read and written by a U-Net."""
    unet, latents = settings["unet"], settings["vae"].get("latent_channels", 4)
    for key in ("in_channels", "out_channels"):
        yield f"{key} in unet", unet.get(key, 4), "latent_channels in vae", latents


@final
class StableDiffusion(PipelineModel):
    """The networks of a StableDiffusionPipeline."""

    pipeline_name = "StableDiffusionPipeline"
    network_name = "unet"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    classes: ClassVar = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    unused: ClassVar = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    lora_targets: ClassVar = {"unet": UNET_LINEAR, "text_encoder": CLIP_ATTENTION}
    kohya = KohyaLayout({"unet": "lora_unet", "text_encoder": "lora_te"})
    blocks = UNET_BLOCKS
    supported: ClassVar = UNET_SUPPORTED
    repeated = UNET_REPEATED
    has_cfg = True

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        self.scheduler = ddim_of(pipeline.scheduler)
        self.process = self._table = VariancePreserving(self.scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        return unet_limits(folder)

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        yield from unet_fits(settings)
        width = settings["unet"].get("cross_attention_dim")
        yield sum_fit(settings, "cross_attention_dim in unet", width, "hidden_size", cls.encoders)

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return table_times(self._table, self.scheduler, num_inference_steps)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"states": (self.tokens["text_encoder"], settings["cross_attention_dim"])}

    def encode(self, prompts: list[str]) -> Conditioning:
        states, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return Conditioning({"states": states})

    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        dtype = dtype_of(network)
        timestep = table_index(self._table, t, x_t.device)
        return network(x_t.to(dtype), timestep, cond.tensors["states"].to(dtype)).sample.float()
