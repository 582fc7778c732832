"""Conversion of LDM autoencoders and OpenCLIP text towers to diffusers folders."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

LDM_SCALE = 0.18215  # of Stable Diffusion 1 and 2; LDM's files do not state it
OWN = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv)\.")
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # in a checkpoint of a whole Stable Diffusion 2
HEAD_WIDTH = 64  # of every text tower of OpenCLIP


def write_autoencoder(state: Mapping[str, Tensor], folder: Path, setting: str) -> None:
    """Write an LDM autoencoder in diffusers' layout, with sizes taken from its tensors.

    Raises:
        ValueError: if the tensors are not those of an AutoencoderKL.
    """
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    whole = "first_stage_model."
    inner = {k.removeprefix(whole): v for k, v in state.items() if k.startswith(whole)} or state
    own = {key: tensor for key, tensor in inner.items() if OWN.match(key)}
    try:
        settings = _autoencoder_settings(own)
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(settings)
        vae.load_state_dict(convert_ldm_vae_checkpoint(own, settings), assign=True)
    except (KeyError, RuntimeError, AttributeError) as error:
        reason = str(error).replace("\n", " ")[:300]
        raise ValueError(
            f"{setting} is no autoencoder in LDM's names ({type(error).__name__}: {reason}); give "
            "a file with encoder.*, decoder.* and quant_conv, or a diffusers folder"
        ) from error
    vae.float().save_pretrained(folder)


def _autoencoder_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.")
    matches = [match for key in state if (match := pattern.match(key))]
    levels, blocks = (1 + max((int(match[i]) for match in matches), default=0) for i in (1, 2))
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
    return {
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": len(state["decoder.conv_out.weight"]),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "layers_per_block": blocks,
        "norm_num_groups": 32,
        "sample_size": 64 * 2 ** (levels - 1),
        "scaling_factor": LDM_SCALE,
    }


def write_open_clip(state: Mapping[str, Tensor], folder: Path, setting: str) -> dict[str, Any]:
    """Write an OpenCLIP text tower without its last layer, as Stable Diffusion 2 uses it.

    The final norm then follows the layer before the last. Returns the settings.

    Raises:
        ValueError: if the tensors are not those of an OpenCLIP model.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig

    prefix = OPEN_CLIP_PREFIX if any(k.startswith(OPEN_CLIP_PREFIX) for k in state) else ""
    own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    layers = {m[1] for key in own if (m := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    if len(layers) < 2 or "positional_embedding" not in own:
        raise ValueError(
            f"{setting} is no OpenCLIP model: it has no transformer.resblocks and "
            "positional_embedding; give open_clip_pytorch_model.safetensors, or a transformers "
            "folder of a CLIP"
        )
    last = f"transformer.resblocks.{max(map(int, layers))}."
    own = {key: tensor.float() for key, tensor in own.items() if not key.startswith(last)}
    positions, width = own["positional_embedding"].shape
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=len(layers) - 1,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=positions,
        vocab_size=len(own["token_embedding.weight"]),
        hidden_act="gelu",
    )
    own["text_projection"] = own.get("text_projection", own["positional_embedding"].T)
    named = convert_open_clip_checkpoint(_Sized(config), own, prefix="")
    named.pop("text_projection.weight")
    return write_text_encoder(config, named, folder)


class _Sized:
    """The attribute of a text model that diffusers' converter reads."""

    def __init__(self, config: Any) -> None:
        self.config = config


def write_text_encoder(config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write a CLIPTextModel by names that every version of transformers reads; return settings."""
    settings = {**config.to_dict(), "architectures": ["CLIPTextModel"]}
    write_json(folder / "config.json", settings, sort_keys=True)
    tensors = {
        f"text_model.{key.removeprefix('text_model.')}": tensor.contiguous()
        for key, tensor in state.items()
        if not key.endswith("position_ids")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return settings


def write_json(file: Path, content: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write one of a folder's JSON files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(content), indent=2, sort_keys=sort_keys) + "\n"
    file.write_text(text, encoding="utf-8")
