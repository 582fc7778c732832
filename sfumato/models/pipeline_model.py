"""What all families share: a diffusers pipeline's networks behind the contract."""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from sfumato.models.adapters import CopyRoles, FrozenRoles, LoraRoles, Roles
from sfumato.models.formats import (
    check_components,
    check_index,
    check_scheduler,
    copy_frozen,
    quiet_loading,
    read_json,
    read_model_index,
    save_encoder,
)
from sfumato.models.kohya import KohyaLayout
from sfumato.models.limits import Limits, check_side, check_steps
from sfumato.models.lora_apply import (
    check_lora_files,
    fuse_elsewhere,
    merge_files,
    save_adapters,
    start_adapters,
)
from sfumato.models.model import DTYPES, Conditioning, Framing, Role, TextToImageModel

CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
CLIP_ATTENTION = (r".*self_attn\.(q|k|v|out)_proj",)


class PipelineModel(TextToImageModel):
    """A diffusers pipeline as a TextToImageModel; a family adds its own arithmetic.

    Attributes:
        parts: the network and every text encoder by its component's name, in their two roles.
        scheduler: of the class whose settings `times` follows.
    """

    pipeline_name: ClassVar[str]  # as model_index.json has it
    network_name: ClassVar[str]  # the component that predicts
    encoders: ClassVar[tuple[str, ...]]  # the components that read prompts
    tokenizers: ClassVar[tuple[str, ...]]
    optional: ClassVar[frozenset[str]] = frozenset()  # what model_index.json may leave out
    upcast: ClassVar[tuple[str, ...]] = ()  # kept in float32 where their `force_upcast` says so
    unused: ClassVar[Mapping[str, Any]] = {}  # from_pretrained's arguments that leave parts out
    schedulers: ClassVar[str] = r"(?!EDM|FlowMatch).*"  # of the process, as a regular expression
    lora_targets: ClassVar[Mapping[str, Sequence[str]]]  # the preset, by component
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
        self.trains_text = self.trained_names != [self.network_name]

    # --- What a family adds

    @staticmethod
    @abc.abstractmethod
    def read_limits(folder: Path) -> Limits:
        """Read from the JSON files of a folder what sizes and steps the model can do."""

    @abc.abstractmethod
    def encode(self, prompts: list[str], framing: Sequence[Framing] | None) -> Conditioning:
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

    # --- Reading

    @classmethod
    def components(cls, folder: Path) -> dict[str, str]:
        """Return the components that a folder has to hold, with the files that configure them."""
        index = read_model_index(folder)
        names = ["scheduler", "vae", cls.network_name, *cls.encoders, *cls.tokenizers]
        absent = {name for name in cls.optional if index.get(name) in (None, [None, None])}
        return {
            name: CONFIGS.get(name.split("_")[0], "config.json")
            for name in names
            if name not in absent
        }

    @classmethod
    def check(cls, folder: Path, config: ModelConfig, sampler: SamplerConfig | None = None) -> None:
        """Check that all components are there and can do what a sampler asks, reading no weight.

        Raises:
            ValueError: if one is missing, or pickled and not allowed; if a part to train is none
                of the model's; if image size or number of steps are impossible.
        """
        check_components(folder, cls.components(folder), allow_pickle=config.allow_pickle)
        check_index(folder, cls.components(folder))
        check_scheduler(folder, cls.schedulers)
        cls.trained_parts(config)
        check_lora_files(config)
        if sampler is None:
            return
        limits = cls.read_limits(folder)
        check_steps(sampler.num_inference_steps, limits)
        for name, pixels in (("height", sampler.height), ("width", sampler.width)):
            if pixels is not None:
                check_side(name, pixels, limits)
            elif limits.size is None:
                raise ValueError(
                    f"model.pretrained = {str(folder)!r} states no size of its images; set "
                    f"sampler.{name} in pixels, a multiple of {limits.multiple}"
                )

    @classmethod
    def trained_parts(cls, config: ModelConfig) -> list[str]:
        """Return the components that are trained; `network` stands for the one that predicts.

        Raises:
            ValueError: if one is unknown.
        """
        can = [name for name in cls.encoders if name in cls.lora_targets]
        for part in config.parts:
            if part not in {"network", cls.network_name, *can}:
                raise ValueError(
                    f"model.parts has {part!r}; of a {cls.pipeline_name} these can be trained: "
                    f"{', '.join(['network', *can])}"
                )
        return [cls.network_name if part == "network" else part for part in config.parts]

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> "PipelineModel":
        """Load a diffusers folder; frozen parts in `config.dtype`, trained ones in float32.

        Under full fine-tuning the frozen copy stays in float32 too, as rounding it would count
        as a distance from it.

        Raises:
            ValueError: if a component cannot be read, or a LoRA pattern matches no layer.
        """
        trained = cls.trained_parts(config)
        dtype = DTYPES[config.dtype]
        exact = [*cls._upcast(folder), *(trained if config.trainable == "full" else [])]
        pipeline = cls.read_pipeline(folder, config, dtype, dict.fromkeys(exact, torch.float32))
        changed = merge_files(pipeline, cls.network_name, config.merge)
        parts: dict[str, Roles] = {}
        for name in (cls.network_name, *cls.encoders):
            part = pipeline.components[name]
            if part is None:
                continue
            part.eval().requires_grad_(False)
            if name in trained:
                parts[name] = cls._roles(name, part, config)
            else:
                parts[name] = FrozenRoles(part, is_changed=name in changed)
        if config.lora.start is not None:
            start_adapters(pipeline, cls.network_name, parts, config.lora.start)
        pipeline.vae.eval().requires_grad_(False)
        if config.gradient_checkpointing:
            pipeline.components[cls.network_name].enable_gradient_checkpointing()
            if pipeline.vae._supports_gradient_checkpointing:
                pipeline.vae.enable_gradient_checkpointing()
        return cls(pipeline, parts, folder, config)

    @classmethod
    def _upcast(cls, folder: Path) -> list[str]:
        """Return the components that overflow in half precision, as their settings say."""
        settings = {name: read_json(folder / name / "config.json") for name in cls.upcast}
        return [name for name, found in settings.items() if found.get("force_upcast", True)]

    @classmethod
    def _roles(cls, name: str, part: Any, config: ModelConfig) -> Roles:
        if config.gradient_checkpointing and name != cls.network_name:
            part.gradient_checkpointing_enable()
        if config.trainable == "full":
            return CopyRoles(part, reference=config.reference)
        own = config.lora.targets if name == cls.network_name else config.lora.encoder_targets
        return LoraRoles(part, config.lora, cls.lora_targets[name] if own is None else own)

    @classmethod
    def read_pipeline(
        cls,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> Any:
        """Read a folder with diffusers alone.

        Args:
            dtypes: of components that are not to be in `dtype`.

        Raises:
            ValueError: if a component cannot be read.
        """
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from safetensors import SafetensorError

        quiet_loading()
        try:
            return DiffusionPipeline.from_pretrained(
                folder,
                dtype={"default": dtype, **(dtypes or {})},
                variant=config.variant,
                use_safetensors=None if config.allow_pickle else True,
                local_files_only=True,
                **cls.unused,
                **dict.fromkeys(cls.optional.difference(cls.components(folder))),
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"model.pretrained = {str(folder)!r} could not be read as {cls.pipeline_name}: "
                f"{str(error).splitlines()[0]}"
            ) from error

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
            check_side(name, pixels, self.limits)
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
            return self.encode(list(prompts), framing)

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
