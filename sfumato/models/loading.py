"""Loading of a family from a diffusers folder: checked without weights, with them, or on meta."""

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.config import ModelConfig, SamplerConfig
from sfumato.models.adapters import CopyRoles, FrozenRoles, LoraRoles, Roles
from sfumato.models.agreement import check_fits, check_inputs, check_noise, check_tokenizer
from sfumato.models.formats import (
    check_class,
    check_components,
    check_libraries,
    check_scheduler,
    read_json,
    read_model_index,
    read_pipeline,
)
from sfumato.models.limits import check_sampling, check_side
from sfumato.models.lora import check_lora_files, merge_files, start_adapters
from sfumato.models.model import DTYPES
from sfumato.models.origins import blank_network, check_whole, start_network
from sfumato.models.pipeline_model import PipelineModel
from sfumato.weights import load_whole


def check_family(
    family: type[PipelineModel],
    folder: Path,
    config: ModelConfig,
    sampler: SamplerConfig | None = None,
) -> None:
    """Check a folder's components, and that they can do what a sampler asks; read no weight.

    Raises:
        ValueError: if a component is missing, or pickled and not allowed; if the model has no
            such part to train; if image size or number of steps are impossible.
    """
    blank = family.network_name if config.network.config is not None else None
    components = family.components(folder)
    check_libraries(folder, family.unused)
    check_components(folder, components, family.classes, config, blank=blank)
    check_scheduler(folder, family.schedulers)
    _check_agreement(family, folder, components)
    trained_parts(family, config)
    check_lora_files(config)
    if sampler is None:  # nothing is predicted, or it was checked before
        return
    check_noise(folder)
    limits = family.read_limits(folder)
    check_sampling(sampler, limits)
    for name, pixels in (("height", sampler.height), ("width", sampler.width)):
        if pixels is not None:
            check_side(f"sampler.{name}", pixels, limits)
        elif limits.size is None:
            raise ValueError(
                f"model.pretrained = {str(folder)!r} states no size of its images; set "
                f"sampler.{name} in pixels, a multiple of {limits.multiple}"
            )


def _check_agreement(
    family: type[PipelineModel], folder: Path, components: Mapping[str, str]
) -> None:
    """Check that the parts of a folder fit together, and ask for no input that is not given."""
    files = {name: folder / name / "config.json" for name in _networks(family)}
    settings = {n: read_json(file) if n in components else {} for n, file in files.items()}
    network = family.network_name
    check_inputs(files[network], settings[network], family.supported)
    check_fits(folder, family.fits(settings))
    for encoder in family.encoders:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        if encoder in components and tokenizer in components:
            check_tokenizer(folder, tokenizer, encoder)


def _networks(family: type[PipelineModel]) -> tuple[str, ...]:
    """Return the components that are networks, also those that a folder may lack."""
    return (family.network_name, "vae", *family.encoders)


def trained_parts(family: type[PipelineModel], config: ModelConfig) -> list[str]:
    """Return the components that are trained; `network` means the one that predicts.

    Raises:
        ValueError: if a part is unknown or has no layers to train.
    """
    trainable = [name for name in family.encoders if name in family.lora_targets]
    for part in config.parts:
        if part not in {"network", family.network_name, *trainable}:
            raise ValueError(
                f"model.parts has {part!r}; of a {family.pipeline_name} these can be trained: "
                f"{', '.join(['network', *trainable])}"
            )
    return [family.network_name if part == "network" else part for part in config.parts]


def load_family(
    family: type[PipelineModel], folder: Path, config: ModelConfig, *, with_network: bool = True
) -> PipelineModel:
    """Load a diffusers folder; frozen parts in `config.dtype`, trained ones in float32.

    Under full fine-tuning the frozen copy stays in float32 too: rounding would count as a
    distance from it.

    Args:
        with_network: False loads only the encoders; nothing is trained then.

    Raises:
        ValueError: if a component cannot be read, or a LoRA pattern matches no layer.
    """
    trained = trained_parts(family, config) if with_network else []
    if with_network and not (family.network_name in trained and config.trainable == "full"):
        check_whole(config)
    without = family.left_out(folder)
    if not with_network:
        without[family.network_name] = None
    elif config.network.config is not None:
        without |= blank_network(folder / family.network_name, family.network_name)
    dtypes = _dtypes(family, folder, config, trained)
    for name in _networks(family):
        if name not in without:
            without[name] = _load_component(family, folder, name, config, dtypes)
    pipeline = read_pipeline(folder, config, dtypes, without)
    if with_network and config.network.from_pretrained is not None:
        network = pipeline.components[family.network_name]
        start_network(network, family.network_name, config)
    changed = merge_files(pipeline, family.network_name, config.merge)
    model = _assemble(family, pipeline, folder, config, trained, changed)
    if config.lora.start is not None:
        start_adapters(pipeline, family.network_name, model.parts, config.lora.start)
    return model


def load_on_meta(family: type[PipelineModel], folder: Path, config: ModelConfig) -> PipelineModel:
    """Build the model that `load_family` loads, from JSON files: its networks have no memory.

    `sfumato plan` counts its parts, and runs an objective with it. Prompts are encoded to zeros.

    Args:
        folder: holds model_index.json, the settings of scheduler and networks, and the
            tokenizers' tokenizer_config.json; neither weights nor vocabularies are read.

    Raises:
        ValueError: if a component cannot be built, or a LoRA pattern matches no layer.
    """
    trained = trained_parts(family, config)
    dtypes = _dtypes(family, folder, config, trained)
    names = [name for name in _networks(family) if name in family.components(folder)]
    networks = {name: _on_meta(family, folder, name) for name in names}
    for name, network in networks.items():
        # diffusers' own `to` would warn that layers may be needed in float32.
        nn.Module.to(network, dtypes.get(name, dtypes["default"]))
    without = {**family.left_out(folder), **dict.fromkeys(family.tokenizers)}
    pipeline = read_pipeline(folder, config, dtypes, without | networks)
    return _assemble(family, pipeline, folder, config, trained)


def _load_component(
    family: type[PipelineModel],
    folder: Path,
    name: str,
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
) -> nn.Module:
    """Load a network or an encoder; a variant is read where the component has one."""
    part, variant = folder / name, config.variant
    options: dict[str, Any] = {"use_safetensors": None if config.allow_pickle else True}
    if variant is not None and any(f".{variant}." in path.name for path in part.iterdir()):
        options["variant"] = variant
    dtype = dtypes.get(name, dtypes["default"])
    kind = class_of(folder, name, family.classes[name])
    return load_whole(kind, part, f"{name} of model.pretrained", dtype=dtype, **options)


def class_of(folder: Path, name: str, known: str) -> Any:
    """Return the class of a component, from diffusers or transformers.

    Raises:
        ValueError: if model_index.json names another class than the known one.
    """
    entry: Any = read_model_index(folder)[name]
    check_class(folder, entry, name, known)
    return getattr(importlib.import_module(entry[0]), known)


def _on_meta(family: type[PipelineModel], folder: Path, name: str) -> nn.Module:
    kind = class_of(folder, name, family.classes[name])
    with torch.device("meta"):
        if kind.__module__.startswith("diffusers."):
            return kind.from_config(read_json(folder / name / "config.json"))
        return kind(kind.config_class.from_pretrained(folder / name))


def _dtypes(
    family: type[PipelineModel], folder: Path, config: ModelConfig, trained: list[str]
) -> dict[str, torch.dtype]:
    """Return the dtype in which each component is loaded, and the others' as `default`."""
    settings = {name: read_json(folder / name / "config.json") for name in family.upcast}
    exact = [name for name, each in settings.items() if each.get("force_upcast", True)]
    exact += trained if config.trainable == "full" else []
    return {"default": DTYPES[config.dtype], **dict.fromkeys(exact, torch.float32)}


def _assemble(
    family: type[PipelineModel],
    pipeline: Any,
    folder: Path,
    config: ModelConfig,
    trained: list[str],
    changed: Collection[str] = (),
) -> PipelineModel:
    """Freeze a pipeline's networks, and give the trained ones their two roles.

    Args:
        changed: components that LoRA files were merged into.
    """
    pipeline.vae.eval().requires_grad_(False)
    parts: dict[str, Roles] = {}
    for name in (family.network_name, *family.encoders):
        part = pipeline.components[name]
        if part is None:
            continue
        part.eval().requires_grad_(False)
        if name in trained:
            parts[name] = _roles(family, name, part, config)
        else:
            parts[name] = FrozenRoles(part, is_changed=name in changed)
    if config.gradient_checkpointing and family.network_name in parts:
        pipeline.components[family.network_name].enable_gradient_checkpointing()
        if pipeline.vae._supports_gradient_checkpointing:
            pipeline.vae.enable_gradient_checkpointing()
    return family(pipeline, parts, folder, config)


def _roles(family: type[PipelineModel], name: str, part: Any, config: ModelConfig) -> Roles:
    if config.gradient_checkpointing and name != family.network_name:
        part.gradient_checkpointing_enable()
    if config.trainable == "full":
        return CopyRoles(part, reference=config.reference)
    targets = config.lora.targets if name == family.network_name else config.lora.encoder_targets
    return LoraRoles(part, config.lora, family.lora_targets[name] if targets is None else targets)
