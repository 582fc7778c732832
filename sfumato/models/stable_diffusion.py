"""Stable Diffusion 1.x and 2.x: a U-Net in latent space, conditioned on one CLIP text encoder."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import Prediction, PredictionType, Time, VariancePreserving
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.adapters import CopyRoles, LoraRoles, Roles
from sfumato.models.formats import check_components, copy_frozen, quiet_loading, read_json
from sfumato.models.model import DTYPES, Conditioning, Role, TextToImageModel

COMPONENTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


@final
class StableDiffusion(TextToImageModel):
    """A StableDiffusionPipeline's networks behind the contract of TextToImageModel."""

    def __init__(self, pipeline: Any, roles: Roles, source: Path, config: ModelConfig) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        self.pipeline = pipeline
        self.source = source
        self.config = config
        self.roles = roles
        self.network = roles.policy
        # DDIM's default would clip latents to the range of pixels, where a file does not say.
        self.scheduler: Any = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
        self.process = self._table = VariancePreserving(self.scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = self.scheduler.config["prediction_type"]
        self._warned = False

    @staticmethod
    def check(folder: Path, config: ModelConfig, sampler: SamplerConfig | None = None) -> None:
        """Check that all components are there and can do what a sampler asks, reading no weight.

        Raises:
            ValueError: if one is missing, or pickled and not allowed; if image size or number of
                steps are impossible.
        """
        check_components(folder, COMPONENTS, allow_pickle=config.allow_pickle)
        if sampler is None:
            return
        scheduler = read_json(folder / "scheduler" / COMPONENTS["scheduler"])
        _check_steps(sampler.num_inference_steps, scheduler.get("num_train_timesteps", 1000))
        factor = _downsampling(read_json(folder / "vae" / COMPONENTS["vae"]))
        for name, pixels in (("height", sampler.height), ("width", sampler.width)):
            if pixels is not None:
                _check_side(name, pixels, factor)
            elif read_json(folder / "unet" / COMPONENTS["unet"]).get("sample_size") is None:
                raise ValueError(
                    f"model.pretrained = {str(folder)!r} states no size of its images; set "
                    f"sampler.{name} in pixels, a multiple of {factor}"
                )

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "StableDiffusion":
        """Load a diffusers folder; frozen parts in `config.dtype`, trained ones in float32.

        Under full fine-tuning the frozen network stays in float32 too, as rounding it would count
        as a distance from it.

        Raises:
            ValueError: if a component cannot be read.
        """
        full = config.trainable == "full"
        dtype = DTYPES[config.dtype]
        pipeline = _read_pipeline(folder, config, dtype, torch.float32 if full else dtype)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.eval().requires_grad_(False)
        if config.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
            pipeline.vae.enable_gradient_checkpointing()
        roles = CopyRoles(pipeline.unet) if full else LoraRoles(pipeline.unet, config.lora)
        return cls(pipeline, roles, folder, config)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> None:
        for part in (self.pipeline.vae, self.pipeline.text_encoder, *self.roles.networks()):
            part.to(device)

    @property
    def _factor(self) -> int:
        return _downsampling(self.pipeline.vae.config)

    def image_size(self) -> tuple[int, int]:
        latents = self.pipeline.unet.config.sample_size
        height, width = (latents, latents) if isinstance(latents, int) else latents
        return height * self._factor, width * self._factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        for name, pixels in (("height", height), ("width", width)):
            _check_side(name, pixels, self._factor)
        channels = self.pipeline.unet.config.in_channels
        return channels, height // self._factor, width // self._factor

    def times(self, num_inference_steps: int, height: int, width: int) -> Sequence[float]:
        available = self._table.num_train_timesteps
        _check_steps(num_inference_steps, available)
        self.scheduler.set_timesteps(num_inference_steps)
        indices = [min(int(index), available - 1) for index in self.scheduler.timesteps]
        last = -1 if self.scheduler.config["set_alpha_to_one"] else 0
        return [self._table.time(index) for index in [*indices, last]]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tokenizer = self.pipeline.tokenizer
        limit = tokenizer.model_max_length
        if not self._warned:
            counts = [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]
            if max(counts) > limit:
                self._warned = True
                long = prompts[counts.index(max(counts))]
                warnings.warn(
                    f"prompts are cut at {limit} tokens; the first one cut has {max(counts)}: "
                    f"{long[:80]!r} (said once)",
                    stacklevel=2,
                )
        with torch.no_grad():
            states, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return Conditioning({"states": states})

    def encode_images(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        vae = self.pipeline.vae
        latents = vae.encode(images.to(vae.dtype)).latent_dist.mean
        return latents.float() * vae.config.scaling_factor

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        vae = self.pipeline.vae
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        return (decoded.float() + 1) / 2

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        states = cond.tensors["states"]
        if uncond is None or guidance_scale <= 1.0:
            guided = False
        else:
            guided, states = True, torch.cat([uncond.tensors["states"], states])

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            rows = torch.cat([x_t, x_t]) if guided else x_t
            timestep = self._timestep(t, x_t.device)
            if guided and timestep.ndim:
                timestep = timestep.repeat(2)
            with self.roles.acting(role) as network:
                dtype = network.dtype
                raw = network(rows.to(dtype), timestep, states.to(dtype)).sample.float()
            if guided:
                without, with_prompt = raw.chunk(2)
                raw = classifier_free(with_prompt, without, guidance_scale, cfg_gradient)
            return self.process.read(self.prediction_type, raw, x_t, t)

        return denoise

    def _timestep(self, t: Time, device: torch.device) -> Tensor:
        """Return the training step of t on the device; a number is filled in, without a copy."""
        index = self._table.index(t)
        return index if isinstance(index, Tensor) else torch.full((), index, device=device)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def shards(self) -> Sequence[nn.Module]:
        blocks: list[nn.Module] = []
        unets: Any = self.roles.networks()
        for unet in unets:
            blocks += [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet]
        return blocks

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        merged: Any = self.roles.merged().cpu()
        for parameter in merged.parameters():
            parameter.data = parameter.data.to(dtype)
        merged.save_pretrained(folder / "unet")
        frozen = [name for name in COMPONENTS if name != "unet"]
        copy_frozen(self.source, folder, frozen, variant=self.config.variant)

    def open_elsewhere(self, exported: Path, name: str) -> Any:
        folder, config = self.source, self.config
        if name == "pipeline":
            folder, config = exported / "pipeline", replace(config, variant=None)
        pipeline = _read_pipeline(folder, config, self.pipeline.vae.dtype)
        pipeline.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if name == "lora":
            pipeline.load_lora_weights(exported / "lora")
        return pipeline

    def save_adapter(self, folder: Path) -> None:
        if not isinstance(self.roles, LoraRoles):
            raise ValueError("model.trainable = full trains no adapter; export the pipeline")
        type(self.pipeline).save_lora_weights(folder, unet_lora_layers=self.roles.adapter_state())


def _downsampling(vae: Mapping[str, Any]) -> int:
    """Return how many pixels of a side one latent stands for."""
    return 2 ** (len(vae.get("block_out_channels", (64,))) - 1)  # the default of diffusers


def _check_side(name: str, pixels: int, factor: int) -> None:
    if pixels < factor or pixels % factor:
        nearest = max(factor, round(pixels / factor) * factor)
        raise ValueError(
            f"sampler.{name} = {pixels} must be a multiple of {factor} pixels for this "
            f"autoencoder; the nearest is {nearest}"
        )


def _check_steps(num_inference_steps: int, available: int) -> None:
    if num_inference_steps > available:
        raise ValueError(
            f"sampler.num_inference_steps = {num_inference_steps} is more than the {available} "
            "steps that this model was trained on"
        )


def _read_pipeline(
    folder: Path, config: ModelConfig, dtype: torch.dtype, unet: torch.dtype | None = None
) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from safetensors import SafetensorError

    quiet_loading()
    # Prompts that are too long are warned about by encode_prompts, once.
    logging.getLogger("diffusers.pipelines.stable_diffusion").setLevel(logging.ERROR)
    try:
        return StableDiffusionPipeline.from_pretrained(
            folder,
            dtype={"default": dtype, "unet": unet or dtype},
            variant=config.variant,
            use_safetensors=None if config.allow_pickle else True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model.pretrained = {str(folder)!r} could not be read as Stable Diffusion: "
            f"{str(error).splitlines()[0]}"
        ) from error
