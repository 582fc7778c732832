"""Networks from settings alone: the U-Nets of Stable Diffusion 1 and 2, or any config.json."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sfumato.config import ModelConfig
from sfumato.models.formats import find_model, read_json, read_model_index

# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-2-base; what they leave out has
# had the same default ever since.
STABLE_DIFFUSION_1: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,  # diffusers' name for the number of heads here
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }
)
STABLE_DIFFUSION_2: Mapping[str, Any] = MappingProxyType(
    {
        **STABLE_DIFFUSION_1,
        "attention_head_dim": [5, 10, 20, 20],  # heads of 64 channels
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
)
BLUEPRINTS = MappingProxyType({"sd1": STABLE_DIFFUSION_1, "sd2": STABLE_DIFFUSION_2})
SETTING = "model.network.config"


def blueprint(config: str) -> dict[str, Any]:
    """Return the settings of a U-Net: by name, or of a config.json or the folder that holds one.

    Raises:
        ValueError: if there is no such name or file, or it describes another network.
    """
    if config in BLUEPRINTS:
        return dict(BLUEPRINTS[config])
    file = Path(config).expanduser()
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"{SETTING} = {config!r}: no such file; give {', '.join(BLUEPRINTS)}, or a diffusers "
            "config.json of a UNet2DConditionModel"
        )
    settings = read_json(file)
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    if kind != "UNet2DConditionModel":
        raise ValueError(
            f"{SETTING} = {config!r} describes {kind or 'no network'}; give the config.json of a "
            "UNet2DConditionModel (unet/config.json of a diffusers folder)"
        )
    return dict(settings)


def build_network(settings: Mapping[str, Any]) -> nn.Module:
    """Build a U-Net at random from torch's generator, in float32, initialised as LDM does.

    The last convolution of each residual block, the last projection of each transformer and the
    output begin as zeros, so that every block begins as the identity; diffusers draws these too.

    Source: zero_module in CompVis/stable-diffusion, openaimodel.py and attention.py.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    network = _construct(settings)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif isinstance(module, Transformer2DModel):
                _zero(module.proj_out)
        _zero(network.conv_out)
    return network


def network_on_meta(config: ModelConfig) -> nn.Module:
    """Return the network of a config, or of a pretrained folder, without memory for its weights.

    Raises:
        ValueError: if neither is given, or it cannot be found or understood.
    """
    if config.network.config is not None:
        with torch.device("meta"):
            return _construct(blueprint(config.network.config))
    if config.pretrained is None:
        raise ValueError(
            "model.pretrained and model.network.config are both null; give the one, a diffusers "
            "folder, or the other: sd1, sd2 or a config.json"
        )
    import diffusers

    folder = find_model(config.pretrained, allow_pickle=config.allow_pickle, variant=config.variant)
    index = read_model_index(folder)
    name = "unet" if "unet" in index else "transformer"
    settings = read_json(folder / name / "config.json")
    kind = getattr(diffusers, settings["_class_name"])
    with torch.device("meta"):
        return kind.from_config(settings)


def _construct(settings: Mapping[str, Any]) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    try:
        return UNet2DConditionModel.from_config(dict(settings))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{SETTING} cannot be built ({error}); mend its config.json") from error


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
