"""Conversion of LDM autoencoders and OpenCLIP text towers to diffusers folders."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sfumato.clip import OpenClip, renamed
from sfumato.weights import differences

LDM_SCALE = 0.18215  # of Stable Diffusion 1 and 2; LDM's files do not state it
OWN = re.compile(r"(?:encoder|decoder|quant_conv|post_quant_conv)\.")
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # in a checkpoint of a whole Stable Diffusion 2
SIZED = (
    *("positional_embedding", "token_embedding.weight"),
    "transformer.resblocks.0.mlp.c_fc.weight",
)
BESIDE_TEXT = re.compile(r"visual\.|(logit_scale|text_projection|attn_mask)$")
HEAD_WIDTH = 64  # of ViT-H's text tower
# What settings must say for a model to be OpenCLIP's ViT-H/14, in transformers' names.
VIT_H: Mapping[str, Mapping[str, int]] = {
    "text": {"hidden_size": 1024, "num_hidden_layers": 24},
    "vision": {"hidden_size": 1280, "num_hidden_layers": 32, "patch_size": 14},
}


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


def write_open_clip(
    state: Mapping[str, Tensor], stated: OpenClip | None, folder: Path, setting: str
) -> tuple[dict[str, Any], int]:
    """Write an OpenCLIP text tower; return its settings, and the token that fills up prompts.

    Stable Diffusion 2 reads ViT-H/14 without its last layer: the final norm follows the layer
    before the last. Of other models all layers are read.

    Args:
        stated: the settings; None if only the file can say which model it is.

    Raises:
        ValueError: if the tensors are not those of an OpenCLIP model, or nothing says of which.
    """
    prefix = OPEN_CLIP_PREFIX if any(k.startswith(OPEN_CLIP_PREFIX) for k in state) else ""
    own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    layers = _layers("transformer", own)
    if layers < 2 or not all(name in own for name in SIZED):
        raise ValueError(
            f"{setting} is no OpenCLIP model: it has no transformer.resblocks and "
            "positional_embedding; give open_clip_pytorch_model.safetensors, or a transformers "
            "folder of a CLIP"
        )
    config: Any
    if prefix or stated is None:  # a checkpoint of a whole Stable Diffusion 2 has no other tower
        config, pad, short = _vit_h(own, layers), 0, True
        if not prefix and not _has_sizes_of_vit_h(own, config):
            raise ValueError(
                f"{setting} does not say which OpenCLIP model it is, and its sizes are not those "
                "of ViT-H/14, which Stable Diffusion 2 reads; put the model's "
                "open_clip_config.json beside it"
            )
    else:
        config, pad, short = stated.config.text_config, stated.pad_id, is_vit_h(stated.config)
    if short:
        config.num_hidden_layers -= 1
        last = f"transformer.resblocks.{config.num_hidden_layers}."
        own = {key: tensor for key, tensor in own.items() if not key.startswith(last)}
    own = {key: tensor.float() for key, tensor in own.items() if not BESIDE_TEXT.match(key)}
    expected = _text_names(config)
    named, names = renamed(own, expected)
    differences(named, expected, names).refuse(setting, "download the model again")
    return write_text_encoder(config, named, folder), pad


def is_vit_h(config: Any) -> bool:
    """Say whether the settings of a CLIPModel are those of OpenCLIP's ViT-H/14."""
    towers = {"text": config.text_config, "vision": config.vision_config}
    return all(
        vars(tower)[key] == value
        for name, tower in towers.items()
        for key, value in VIT_H[name].items()
    )


def _has_sizes_of_vit_h(state: Mapping[str, Tensor], text: Any) -> bool:
    """Say whether tensors have ViT-H/14's sizes; a file may lack the image tower."""
    if any(vars(text)[key] != value for key, value in VIT_H["text"].items()):
        return False
    patches = state.get("visual.conv1.weight")
    if patches is None:
        return True
    found = {
        "hidden_size": len(patches),
        "num_hidden_layers": _layers("visual.transformer", state),
        "patch_size": patches.shape[-1],
    }
    return found == VIT_H["vision"]


def _layers(tower: str, state: Mapping[str, Tensor]) -> int:
    pattern = re.compile(rf"{re.escape(tower)}\.resblocks\.(\d+)\.")
    return 1 + max((int(m[1]) for key in state if (m := pattern.match(key))), default=-1)


def _vit_h(state: Mapping[str, Tensor], layers: int) -> Any:
    """Return the settings of a text tower by its tensors, with ViT-H's activation and heads."""
    from transformers import CLIPTextConfig

    positions, width = state["positional_embedding"].shape
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=positions,
        vocab_size=len(state["token_embedding.weight"]),
        hidden_act="gelu",
    )


def _text_names(config: Any) -> dict[str, Tensor]:
    """Return the weights of a text tower, without memory, by the names in transformers' files."""
    import torch
    from transformers import CLIPTextModel

    with torch.device("meta"):
        weights = CLIPTextModel(config).state_dict()
    return {f"text_model.{key.removeprefix('text_model.')}": t for key, t in weights.items()}


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
