"""What a recipe trains, as networks on the meta device and sizes: no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sfumato.config import ModelConfig, TrainConfig
from sfumato.models.adapters import LoraRoles
from sfumato.models.flux import Flux
from sfumato.models.limits import Limits
from sfumato.models.model import DTYPES
from sfumato.models.origins import construct_unet, unet_settings
from sfumato.models.pipeline_model import PipelineModel
from sfumato.models.registry import find_family
from sfumato.models.stable_diffusion import StableDiffusion
from sfumato.planning.encoders import (
    Encoders,
    assumed_encoders,
    component_on_meta,
    read_encoders,
)
from sfumato.planning.inputs import Shape, conditioning_shapes
from sfumato.run.open_data import frame_size

LATENT_CHANNELS, FACTOR = 4, 8  # of Stable Diffusion's autoencoder


@dataclass(frozen=True)
class Blueprint:
    """What a recipe trains and what stands around it.

    Attributes:
        network: that predicts, on the meta device, its adapters in place under LoRA.
        blocks: its parts that FSDP gathers one by one.
        size: height and width of the images, in pixels.
        latent: (c, h, w) of one sample.
        conditioning: the shape of one prompt's states, by name.
        assumed: what the recipe leaves open, in words.
    """

    network: Any
    blocks: tuple[nn.Module, ...]
    encoders: Encoders
    size: tuple[int, int]
    latent: Shape
    conditioning: Mapping[str, Shape]
    assumed: tuple[str, ...]


def read_blueprint(config: TrainConfig) -> Blueprint:
    """Build what a recipe trains.

    Raises:
        ValueError: if the network is neither given nor described, or a part of it is unknown.
    """
    model = config.model
    if _is_described(model):
        family: type[PipelineModel] = StableDiffusion
        with torch.device("meta"):
            network: Any = construct_unet(unet_settings(str(model.network.config)))
        settings = network.config
        encoders = assumed_encoders(settings["cross_attention_dim"])
        side = model.image_size or FACTOR * settings["sample_size"]
        limits = Limits(LATENT_CHANNELS, FACTOR, FACTOR, (side, side))
    else:
        family, folder = find_family(model, config.sampler)
        network = component_on_meta(folder, family.network_name)
        encoders = read_encoders(folder, family.encoders)
        limits = family.read_limits(folder)
    height, width = frame_size(config, limits)
    blocks = _blocks(family, network)
    _prepare(network, family, model)
    return Blueprint(
        network=network,
        blocks=blocks,
        encoders=encoders,
        size=(height, width),
        latent=(limits.channels, height // limits.factor, width // limits.factor),
        conditioning=conditioning_shapes(network, encoders.tokens),
        assumed=(*encoders.assumed, *_varying(encoders)),
    )


def _is_described(model: ModelConfig) -> bool:
    """Say whether a network's settings are given, but not all the parts that stand around it."""
    return model.network.config is not None and None in (model.autoencoder, model.text_encoder)


def _varying(encoders: Encoders) -> tuple[str, ...]:
    if all(text.config.model_type != "qwen2_5_vl" for text in encoders.texts.values()):
        return ()
    return (f"prompts of {encoders.tokens['text_encoder']} tokens; shorter ones cost less",)


def _blocks(family: type[PipelineModel], network: Any) -> tuple[nn.Module, ...]:
    """Return what `family.blocks` does, which asks for nothing but the network."""
    if family is Flux:
        return (*network.transformer_blocks, *network.single_transformer_blocks)
    if family.network_name == "transformer":
        return tuple(network.transformer_blocks)
    return (*network.down_blocks, network.mid_block, *network.up_blocks)


def _prepare(network: Any, family: type[PipelineModel], model: ModelConfig) -> None:
    """Freeze, adapt and checkpoint a network as loading does."""
    if model.trainable == "full":
        network.requires_grad_(True)
    else:
        network.to(DTYPES[model.dtype])
        preset = family.lora_targets[family.network_name]
        LoraRoles(network, model.lora, model.lora.targets or preset)
    network.train()
    if model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
