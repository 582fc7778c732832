"""U-Nets built from settings only: Stable Diffusion 1 and 2, or any config.json."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from sfumato.files import read_object

# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-2-base; the defaults of the
# settings that they leave out have never changed.
STABLE_DIFFUSION_1: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,  # diffusers' name for the number of heads
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
UNETS = MappingProxyType({"sd1": STABLE_DIFFUSION_1, "sd2": STABLE_DIFFUSION_2})
SETTING = "model.network.config"


def unet_settings(config: str) -> dict[str, Any]:
    """Return the settings of a U-Net.

    Args:
        config: a name in UNETS, a config.json, or the folder of one.

    Raises:
        ValueError: if there is no such name or file, or the file describes another network.
    """
    if config in UNETS:
        return dict(UNETS[config])
    file = Path(config).expanduser()
    file = file / "config.json" if file.is_dir() else file
    advice = (
        "give the config.json of a UNet2DConditionModel (unet/config.json of a diffusers folder)"
    )
    if not file.is_file():
        raise ValueError(
            f"{SETTING} = {config!r}: no such file; choose one of {', '.join(UNETS)}, or {advice}"
        )
    settings = read_object(file, advice)
    kind = settings.get("_class_name")
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{SETTING} = {config!r} describes {kind or 'no network'}; {advice}")
    return settings


def build_network(settings: Mapping[str, Any]) -> nn.Module:
    """Build a U-Net with random weights from torch's generator, float32, initialised as in LDM.

    The last convolution of each residual block, the last projection of each transformer and the
    output layer are zero, so that every block starts as the identity. diffusers draws them too.

    Source: zero_module in CompVis/stable-diffusion, openaimodel.py and attention.py.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    network = construct_unet(settings)
    zeroed = [network.conv_out]
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            zeroed.append(module.conv2)
        elif isinstance(module, Transformer2DModel):
            zeroed.append(module.proj_out)
    for parameter in nn.ModuleList(zeroed).parameters():
        nn.init.zeros_(parameter)
    return network


def construct_unet(settings: Mapping[str, Any]) -> Any:
    """Build a U-Net with diffusers' own initialisation; on the meta device, without memory.

    Raises:
        ValueError: if the settings contradict each other.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    try:
        return UNet2DConditionModel.from_config(dict(settings))
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{SETTING} cannot be built ({error}); correct its config.json") from error
