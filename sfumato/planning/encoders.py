"""Autoencoders and text encoders on the meta device: those of a folder, or Stable Diffusion's."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sfumato.models.formats import read_json, read_model_index
from sfumato.models.qwen_image import MAX_TOKENS
from sfumato.models.stable_diffusion_3 import T5_TOKENS
from sfumato.planning.step import forward_flops

# vae/config.json of stable-diffusion-v1-5 and stable-diffusion-2-base.
SD_AUTOENCODER: Mapping[str, Any] = MappingProxyType(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
)
# text_encoder/config.json of the same, by the width of their states: CLIP ViT-L/14, and OpenCLIP
# ViT-H/14 up to its penultimate layer.
SD_TEXT_ENCODERS: Mapping[int, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        768: (
            "CLIP ViT-L/14",
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        ),
        1024: (
            "OpenCLIP ViT-H/14, 23 layers",
            {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16},
        ),
    }
)


@dataclass(frozen=True)
class Encoders:
    """What turns images and captions into what the network sees; nothing of it is trained.

    Attributes:
        autoencoder: on the meta device; text encoders likewise, by their components' names.
        tokens: of a prompt that each text encoder reads; the most, where their number varies.
        assumed: what was not given, in words.
    """

    autoencoder: nn.Module
    texts: Mapping[str, Any]
    tokens: Mapping[str, int]
    assumed: tuple[str, ...] = ()


def assumed_encoders(context: int) -> Encoders:
    """Return Stable Diffusion's encoders for states of `context` channels.

    Raises:
        ValueError: if Stable Diffusion 1 and 2 have no such states.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    if context not in SD_TEXT_ENCODERS:
        raise ValueError(
            f"model.network.config has cross_attention_dim = {context}, which no text encoder of "
            f"Stable Diffusion fits ({', '.join(map(str, SD_TEXT_ENCODERS))}); give "
            "model.pretrained, a diffusers folder of the whole model"
        )
    name, shape = SD_TEXT_ENCODERS[context]
    settings = CLIPTextConfig(intermediate_size=4 * shape["hidden_size"], **shape)
    kind: Any = AutoencoderKL  # its annotations are too narrow
    with torch.device("meta"):
        autoencoder, text = kind(**SD_AUTOENCODER), CLIPTextModel(settings)
    assumed = f"Stable Diffusion's autoencoder (8 x 8 pixels, 4 channels) and text encoder ({name})"
    return Encoders(autoencoder, {"text_encoder": text}, {"text_encoder": 77}, (assumed,))


def read_encoders(folder: Path, names: tuple[str, ...]) -> Encoders:
    """Return the encoders that a diffusers folder describes, without reading a weight.

    Args:
        names: of the text encoders' components; one that the folder leaves out is left out.
    """
    texts = {name: part for name in names if (part := component_on_meta(folder, name)) is not None}
    autoencoder = component_on_meta(folder, "vae")
    assert autoencoder is not None, "checked with the folder"
    tokens = {name: _tokens(folder, name, text) for name, text in texts.items()}
    return Encoders(autoencoder, texts, tokens)


def _tokens(folder: Path, name: str, text: Any) -> int:
    """Return how many tokens of a prompt an encoder reads, at most."""
    match text.config.model_type:
        case "t5" if name == "text_encoder_3":
            return T5_TOKENS
        case "t5":
            tokenizer = name.replace("text_encoder", "tokenizer")
            settings = read_json(folder / tokenizer / "tokenizer_config.json")
            return min(512, int(settings.get("model_max_length", 512)))  # the pipeline's own bound
        case "clip_text_model":
            return text.config.max_position_embeddings
        case _:
            return MAX_TOKENS


def component_on_meta(folder: Path, name: str) -> nn.Module | None:
    """Return a component on the meta device; None where model_index.json leaves it out."""
    entry: Any = read_model_index(folder).get(name)
    if entry in (None, [None, None]):
        return None
    library, class_name = entry
    kind = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(read_json(folder / name / "config.json"))
        return kind(kind.config_class.from_pretrained(folder / name))


def encoding_flops(encoders: Encoders, height: int, width: int) -> int:
    """Return the FLOPs of encoding one picture of height x width pixels and its caption."""
    vae: Any = encoders.autoencoder
    frames = () if type(vae).__name__ == "AutoencoderKL" else (1,)
    image = torch.empty(1, 3, *frames, height, width, device="meta")
    return forward_flops(lambda: vae.encode(image)) + sum(
        forward_flops(_reading(text, encoders.tokens[name]))
        for name, text in encoders.texts.items()
    )


def _reading(text: Any, tokens: int) -> Callable[[], object]:
    """Return a call of a text encoder with one prompt."""
    prompt = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return lambda: text(input_ids=prompt)
