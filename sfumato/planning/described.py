"""JSON files of a U-Net that is only described, with Stable Diffusion's own encoders around it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sfumato.config import ModelConfig
from sfumato.models.origins import construct_unet, unet_settings, write_json, write_settings

TOKENS = 77  # of a prompt
# vae/config.json of stable-diffusion-v1-5 and stable-diffusion-2-base.
AUTOENCODER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
)
# Name and text_encoder/config.json of the same releases, by the width of the states: CLIP ViT-L/14,
# and OpenCLIP ViT-H/14 up to the layer before the last.
TEXT_ENCODERS: Mapping[int, tuple[str, Mapping[str, Any]]] = MappingProxyType(
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


def is_described(model: ModelConfig) -> bool:
    """Say whether the network's settings are given, and some of the encoders are not."""
    return model.network.config is not None and None in (model.autoencoder, model.text_encoder)


def describe_pipeline(model: ModelConfig, folder: Path) -> str:
    """Write the JSON files of a pipeline; return the sentence that says what is assumed.

    Raises:
        ValueError: if the U-Net cannot be built, or no text encoder of Stable Diffusion fits.
    """
    from transformers import CLIPTextConfig

    network = unet_settings(str(model.network.config))
    with torch.device("meta"):
        width = construct_unet(network).config["cross_attention_dim"]
    if width not in TEXT_ENCODERS:
        raise ValueError(
            f"model.network.config has cross_attention_dim = {width}, which no text encoder of "
            f"Stable Diffusion fits ({', '.join(map(str, TEXT_ENCODERS))}); give "
            "model.pretrained, a diffusers folder of the whole model"
        )
    name, sizes = TEXT_ENCODERS[width]
    text = CLIPTextConfig(intermediate_size=4 * sizes["hidden_size"], **sizes)
    write_json(folder / "vae" / "config.json", AUTOENCODER)
    write_json(folder / "text_encoder" / "config.json", text.to_dict())
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": TOKENS})
    write_settings(model, folder, network)
    return f"Stable Diffusion's autoencoder (8 x 8 pixels, 4 channels) and text encoder ({name})"
