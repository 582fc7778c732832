"""Qwen-Image: a transformer over packed latents, conditioned on a language model's states."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfumato.config import ModelConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import PredictionType, RectifiedFlow, Time
from sfumato.models.adapters import Roles
from sfumato.models.agreement import Fit, Settings, sum_fit
from sfumato.models.autoencoder_kl import moments_kl, posterior
from sfumato.models.flux import LATENT_SIDE, pack, rows_of, unpack
from sfumato.models.formats import read_json
from sfumato.models.limits import Limits
from sfumato.models.lora import KohyaLayout
from sfumato.models.model import Conditioning, Images, Latents, Moments
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.schedules import flow_times
from sfumato.precision import dtype_of

MAX_TOKENS = 512  # of a prompt, in the pipeline

LINEAR = (
    r".*\.attn\.to_[qkv]",
    r".*\.attn\.to_out\.0",
    r".*\.attn\.add_[qkv]_proj",
    r".*\.attn\.to_add_out",
    r".*\.(img|txt)_mlp\.net\.(0\.proj|2)",
)


def rescaled_guidance(
    cond: Float[Tensor, "b c h w"],
    uncond: Float[Tensor, "b c h w"],
    scale: float,
    gradient: CfgGradient = "full",
) -> Float[Tensor, "b c h w"]:
    """Guide each token, then rescale it to the norm of the prediction with the prompt.

    Args:
        gradient: of the linear combination, as in `classifier_free`; the norm's is always full.
    """
    height, width = cond.shape[2] // 2, cond.shape[3] // 2
    guided = pack(classifier_free(cond, uncond, scale, gradient))
    norm, guided_norm = (tokens.norm(dim=-1, keepdim=True) for tokens in (pack(cond), guided))
    return unpack(guided * (norm / guided_norm), height, width)


@final
class QwenImage(PipelineModel):
    """The networks of a QwenImagePipeline."""

    pipeline_name = "QwenImagePipeline"
    network_name = "transformer"
    encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    classes: ClassVar = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
    }
    token_limits: ClassVar = {"text_encoder": MAX_TOKENS}
    prompts_vary = True
    schedulers = "FlowMatchEulerDiscreteScheduler"
    lora_targets: ClassVar = {"transformer": LINEAR}
    kohya = KohyaLayout({"transformer": "lora_unet"})
    blocks = ("transformer_blocks",)
    supported: ClassVar = dict.fromkeys(
        ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), (False,)
    )
    repeated = frozenset({"QwenImageTransformerBlock"})
    combine = staticmethod(rescaled_guidance)
    process = RectifiedFlow()
    prediction_type: PredictionType = "flow"
    has_cfg = True
    gives_sigmas = True

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        super().__init__(pipeline, parts, source, config)
        latents, decoder = pipeline.vae.config, pipeline.vae.decoder
        self._mean = torch.tensor(latents.latents_mean).view(-1, 1, 1)
        self._std = torch.tensor(latents.latents_std).view(-1, 1, 1)
        # Nothing reads the text that the last block returns: DDP would wait for its gradient.
        for last in pipeline.transformer.transformer_blocks[-1:] if pipeline.transformer else ():
            last.attn.to_add_out.requires_grad_(False)
            last.txt_mlp.requires_grad_(False)
        if config.gradient_checkpointing:  # diffusers has none for this autoencoder
            for block in (decoder.mid_block, *decoder.up_blocks):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @staticmethod
    def read_limits(folder: Path) -> Limits:
        transformer = read_json(folder / "transformer" / "config.json")
        halvings = read_json(folder / "vae" / "config.json").get("temperal_downsample", (0, 1, 1))
        factor = 2 ** len(halvings)
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        return Limits(
            channels=transformer.get("in_channels", 64) // 4,
            factor=factor,
            multiple=2 * factor,
            size=(LATENT_SIDE * factor, LATENT_SIDE * factor),
            # `shift_terminal` sets where the last step starts, which is 0 / 0 of a single step.
            min_steps=2 if scheduler.get("shift_terminal") else 1,
        )

    @classmethod
    def fits(cls, settings: Mapping[str, Settings]) -> Iterable[Fit]:
        network, channels = settings["transformer"], settings["vae"].get("z_dim")
        packed = None if channels is None else 4 * channels
        read, written = network.get("in_channels"), network.get("out_channels")
        yield "in_channels in transformer", read, "4 z_dim in vae", packed
        yield "out_channels in transformer", written, "z_dim in vae", channels
        width = network.get("joint_attention_dim")
        yield sum_fit(settings, "joint_attention_dim", width, "hidden_size", ["text_encoder"])

    def grid(self, num_inference_steps: int, tokens: int) -> list[float]:
        return flow_times(self.scheduler, num_inference_steps, tokens, even=True)

    def prompt_shapes(self, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        tokens = self.tokens["text_encoder"]
        return {"states": (tokens, settings["joint_attention_dim"]), "mask": (tokens,)}

    def encode(self, prompts: list[str]) -> Conditioning:
        states, mask = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=MAX_TOKENS
        )
        if mask is None:  # prompts of one length
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        return Conditioning({"states": states, "mask": mask})

    def encode_moments(self, images: Images) -> Moments:
        return moments_kl(self.pipeline.vae, images[:, :, None])[:, :, 0]  # one frame

    def draw_latents(self, moments: Moments, noise: Latents | None) -> Latents:
        latents = posterior(moments, noise)
        return (latents - self._mean.to(latents.device)) / self._std.to(latents.device)

    def decode(self, latents: Latents) -> Images:
        vae = self.pipeline.vae
        unscaled = latents * self._std.to(latents.device) + self._mean.to(latents.device)
        # vae.decode of a single frame, without its clamp, which would cut the rewards' gradient.
        frames = vae.decoder(vae.post_quant_conv(unscaled[:, :, None].to(dtype_of(vae))))
        return (frames[:, :, 0].float() + 1) / 2

    def predict(
        self, network: Any, x_t: Latents, t: Time, cond: Conditioning, guidance_scale: float
    ) -> Latents:
        dtype, mask = dtype_of(network), cond.tensors["mask"]
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        tokens = network(
            pack(x_t).to(dtype),
            encoder_hidden_states=cond.tensors["states"].to(dtype),
            encoder_hidden_states_mask=None if mask.is_meta or mask.all() else mask,
            timestep=rows_of(t, x_t),
            img_shapes=[[(1, height, width)]] * len(x_t),
        ).sample
        return unpack(tokens.float(), height, width)

    def pipeline_arguments(
        self, noise: Latents, guidance_scale: float, negative_prompt: str | None = None
    ) -> dict[str, Any]:
        return {
            "latents": pack(noise),
            "true_cfg_scale": guidance_scale,
            "negative_prompt": [negative_prompt or ""] * len(noise),
        }
