"""What all families share: a diffusers pipeline's networks behind the contract."""

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.diffusion.guidance import CfgGradient, classifier_free
from sfumato.diffusion.process import Prediction, Time
from sfumato.diffusion.sampling import Denoiser
from sfumato.models.adapters import Roles
from sfumato.models.formats import copy_frozen, save_encoder
from sfumato.models.limits import check_side
from sfumato.models.lora import KohyaLayout, fuse_elsewhere, save_adapters
from sfumato.models.model import Conditioning, Framing, Role
from sfumato.models.pipeline_files import PipelineFiles


class PipelineModel(PipelineFiles):
    """A diffusers pipeline as a TextToImageModel; a family adds its own arithmetic.

    Attributes:
        parts: the network and every text encoder by its component's name, in their two roles.
        scheduler: of the class whose settings `times` follows.
    """

    kohya: ClassVar[KohyaLayout]
    combine: ClassVar[Callable[[Tensor, Tensor, float, CfgGradient], Tensor]] = staticmethod(
        classifier_free
    )
    scheduler: Any

    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        self.pipeline = pipeline
        self.parts = parts
        self.source = source
        self.config = config
        self.limits = self.read_limits(source)
        self.trained_names = [name for name, part in parts.items() if part.is_trained]
        self.trained = nn.ModuleDict({name: parts[name].policy for name in self.trained_names})
        self.has_reference = all(part.has_reference for part in parts.values())
        self.trains_text = any(name != self.network_name for name in self.trained_names)

    # --- What a family adds

    @abc.abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts with the encoders of `pipeline`, every tensor with a row per prompt."""

    @abc.abstractmethod
    def predict(
        self,
        network: Any,
        x_t: Float[Tensor, "b c h w"],
        t: Time,
        cond: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "b c h w"]:
        """Return the network's output at x_t, float32; `guidance_scale` is for embedding it."""

    @abc.abstractmethod
    def blocks(self, network: Any) -> Sequence[nn.Module]:
        """Return the parts of a network to shard one by one under FSDP, inner ones first."""

    @abc.abstractmethod
    def pipeline_arguments(
        self, noise: Float[Tensor, "b c h w"], guidance_scale: float
    ) -> dict[str, Any]:
        """Return the pipeline's arguments for starting noise and guidance."""

    # --- The contract

    @property
    def roles(self) -> Roles:
        """The two roles of the network that predicts."""
        return self.parts[self.network_name]

    @property
    def network(self) -> nn.Module:
        """The network that predicts, as the policy."""
        return self.roles.policy

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.vae.parameters()).device

    def to(self, device: torch.device) -> None:
        self.pipeline.vae.to(device)
        for part in self.parts.values():
            for network in part.networks():
                network.to(device)

    def image_size(self) -> tuple[int, int]:
        if self.limits.size is None:
            raise ValueError(
                f"model.pretrained = {str(self.source)!r} states no size of its images; set "
                "sampler.height and sampler.width"
            )
        return self.limits.size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        for name, pixels in (("height", height), ("width", width)):
            check_side(f"sampler.{name}", pixels, self.limits)
        factor = self.limits.factor
        return self.limits.channels, height // factor, width // factor

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        role: Role = "policy",
        framing: Sequence[Framing] | None = None,
    ) -> Conditioning:
        learns = self.trains_text and role == "policy" and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), self._encoding(role):
            cond = self.encode(list(prompts))
        return cond if framing is None else cond.framed(framing)

    @contextmanager
    def _encoding(self, role: Role) -> Iterator[None]:
        """Put the encoders of a role into the pipeline."""
        with ExitStack() as stack:
            for name in self.encoders:
                if name in self.trained_names:
                    encoder = stack.enter_context(self.parts[name].acting(role))
                    if self.pipeline.components[name] is not encoder:
                        self.pipeline.register_modules(**{name: encoder})
            yield

    def denoiser(
        self,
        cond: Conditioning,
        *,
        uncond: Conditioning | None = None,
        guidance_scale: float = 1.0,
        role: Role = "policy",
        cfg_gradient: CfgGradient = "full",
    ) -> Denoiser:
        guided = uncond is not None and guidance_scale > 1.0 and self.has_cfg
        rows = Conditioning.stack([uncond, cond]) if uncond is not None and guided else cond

        def denoise(x_t: Tensor, t: Time) -> Prediction:
            x, times = x_t, t
            if guided:
                x = torch.cat([x_t, x_t])
                times = t.repeat(2) if isinstance(t, Tensor) and t.ndim else t
            with self.roles.acting(role) as network:
                raw = self.predict(network, x, times, rows, guidance_scale)
            if guided:
                without, with_prompt = raw.chunk(2)
                raw = type(self).combine(with_prompt, without, guidance_scale, cfg_gradient)
            return self.process.read(self.prediction_type, raw, x_t, t)

        return denoise

    def shards(self) -> Sequence[nn.Module]:
        shards: list[nn.Module] = []
        for name, part in self.parts.items():
            for network in part.networks() if part.is_trained else ():
                shards += [*(self.blocks(network) if name == self.network_name else ()), network]
        return shards

    # --- Writing

    def save_pipeline(self, folder: Path, dtype: torch.dtype) -> None:
        changed = [name for name, part in self.parts.items() if part.is_changed]
        for name in changed:
            merged: Any = self.parts[name].merged().cpu()
            for parameter in merged.parameters():
                parameter.data = parameter.data.to(dtype)
            if name == self.network_name:
                merged.save_pretrained(folder / name)
            else:
                save_encoder(merged, self.source / name, folder / name)
        frozen = [name for name in self.components(self.source) if name not in changed]
        copy_frozen(self.source, folder, frozen, variant=self.config.variant)

    def save_adapter(self, folder: Path) -> None:
        if self.config.trainable != "lora":
            raise ValueError("model.trainable = full trains no adapter; export the pipeline")
        save_adapters(
            folder, self.pipeline, self.network_name, self.parts, self.kohya, self.config.merge
        )

    @torch.no_grad()
    def image_elsewhere(
        self,
        exported: Path,
        name: str,
        prompt: str,
        noise: Float[Tensor, "1 c h w"],
        sampler: SamplerConfig,
    ) -> Float[Tensor, "1 3 H W"]:
        folder, config = self.source, self.config
        if name == "pipeline":
            folder, config = exported / "pipeline", replace(config, variant=None)
        pipeline = self.read_pipeline(folder, config, self.pipeline.vae.dtype)
        pipeline.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if name == "lora":
            fuse_elsewhere(pipeline, self.network_name, config.merge)
            pipeline.load_lora_weights(exported / "lora")
        pipeline.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt,
            height=noise.shape[2] * self.limits.factor,
            width=noise.shape[3] * self.limits.factor,
            num_inference_steps=sampler.num_inference_steps,
            output_type="pt",
            **self.pipeline_arguments(noise, sampler.guidance_scale),
        ).images.float()
