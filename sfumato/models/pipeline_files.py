"""How a diffusers folder of any family is checked and read."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.adapters import CopyRoles, FrozenRoles, LoraRoles, Roles
from sfumato.models.formats import (
    check_components,
    check_index,
    check_scheduler,
    quiet_loading,
    read_json,
    read_model_index,
)
from sfumato.models.limits import Limits, check_side, check_steps
from sfumato.models.lora import check_lora_files, merge_files, start_adapters
from sfumato.models.model import DTYPES, TextToImageModel
from sfumato.models.origins import blank_network, check_whole, start_network

CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
CLIP_ATTENTION = (r".*self_attn\.(q|k|v|out)_proj",)


class PipelineFiles(TextToImageModel):
    """What a family's folder holds, and its way into memory."""

    pipeline_name: ClassVar[str]  # as model_index.json has it
    network_name: ClassVar[str]  # the component that predicts
    encoders: ClassVar[tuple[str, ...]]  # the components that read prompts
    tokenizers: ClassVar[tuple[str, ...]]
    optional: ClassVar[frozenset[str]] = frozenset()  # what model_index.json may leave out
    upcast: ClassVar[tuple[str, ...]] = ()  # kept in float32 where their `force_upcast` says so
    unused: ClassVar[Mapping[str, Any]] = {}  # from_pretrained's arguments that leave parts out
    schedulers: ClassVar[str] = r"(?!EDM|FlowMatch).*"  # of the process, as a regular expression
    lora_targets: ClassVar[Mapping[str, Sequence[str]]]  # the preset, by component

    @abc.abstractmethod
    def __init__(
        self, pipeline: Any, parts: dict[str, Roles], source: Path, config: ModelConfig
    ) -> None:
        """Hold a pipeline whose parts have their roles."""

    @staticmethod
    @abc.abstractmethod
    def read_limits(folder: Path) -> Limits:
        """Read from the JSON files of a folder what sizes and steps the model can do."""

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
        blank = cls.network_name if config.network.config is not None else None
        components = cls.components(folder)
        check_components(folder, components, allow_pickle=config.allow_pickle, blank=blank)
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
                check_side(f"sampler.{name}", pixels, limits)
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
    def load(
        cls, folder: Path, config: ModelConfig, *, with_network: bool = True
    ) -> "PipelineFiles":
        """Load a diffusers folder; frozen parts in `config.dtype`, trained ones in float32.

        Under full fine-tuning the frozen copy stays in float32 too, as rounding it would count
        as a distance from it.

        Args:
            with_network: False loads what encodes alone; nothing is trained then.

        Raises:
            ValueError: if a component cannot be read, or a LoRA pattern matches no layer.
        """
        trained = cls.trained_parts(config) if with_network else []
        dtype = DTYPES[config.dtype]
        exact = [*cls._upcast(folder), *(trained if config.trainable == "full" else [])]
        dtypes = dict.fromkeys(exact, torch.float32)
        if with_network and not (cls.network_name in trained and config.trainable == "full"):
            check_whole(config)
        pipeline = cls.read_pipeline(folder, config, dtype, dtypes, with_network=with_network)
        if with_network and config.network.from_pretrained is not None:
            network = pipeline.components[cls.network_name]
            start_network(network, cls.network_name, config)
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
        if config.gradient_checkpointing and with_network:
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
        *,
        with_network: bool = True,
    ) -> Any:
        """Read a folder with diffusers alone.

        Args:
            dtypes: of components that are not to be in `dtype`.
            with_network: False leaves out the one that predicts.

        Raises:
            ValueError: if a component cannot be read.
        """
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from safetensors import SafetensorError

        quiet_loading()
        given = {} if with_network else {cls.network_name: None}
        if with_network and config.network.config is not None:
            given |= blank_network(folder / cls.network_name, cls.network_name)
        try:
            return DiffusionPipeline.from_pretrained(
                folder,
                dtype={"default": dtype, **(dtypes or {})},
                variant=config.variant,
                use_safetensors=None if config.allow_pickle else True,
                local_files_only=True,
                **cls.unused,
                **dict.fromkeys(cls.optional.difference(cls.components(folder))),
                **given,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"model.pretrained = {str(folder)!r} could not be read as {cls.pipeline_name}: "
                f"{str(error).splitlines()[0]}"
            ) from error
