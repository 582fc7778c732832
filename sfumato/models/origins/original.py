"""The names that the original code (CompVis' LDM, and NeMo after it) gives a U-Net's weights.

model.diffusion_model.input_blocks.1.0.in_layers.2.weight   LDM, and older NeMo
model.diffusion_model.input_blocks.1.0.in_layers.1.weight   NeMo, whose norms hold the activation
down_blocks.0.resnets.0.conv1.weight                        diffusers
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.models.formats import read_json, read_model_index
from sfumato.models.origins.tensor_files import read_tensors

FILE = "unet.safetensors"
PIPELINES = ("StableDiffusionPipeline",)  # Stable Diffusion 1 and 2
PREFIX = "model.diffusion_model."

TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# NeMo's names that LDM has no weights under, so that LDM's own come through unchanged.
# Source: NeMo's openaimodel.py, UNetModel._load_pretrained_model and _legacy_unet_ckpt_mapping.
NEMO = (
    (r"\.in_layers\.1\.", ".in_layers.2."),
    (r"\.out_layers\.2\.", ".out_layers.3."),
    (r"^out\.1\.", "out.2."),
    (r"\.attn1\.norm\.", ".norm1."),
    (r"\.attn2\.norm\.", ".norm2."),
    (r"\.ff\.net\.0\.(weight|bias)$", r".norm3.\1"),
    (r"\.ff\.net\.1\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.net\.3\.", ".ff.net.2."),
)
# What stands before the network's own names, with the wrappers of NeMo and torch.compile.
BEFORE = re.compile(r"(?:(?:model|module|_orig_mod)\.)*diffusion_model\.(?:_orig_mod\.)?")
AVERAGE = re.compile(r"(?:model\.)*model_ema\.(?:_orig_mod)?(?:diffusion_model)?(?:_orig_mod)?")
TRANSFORMER_ENGINE = re.compile(r"\.norm_to_q\.|\.ff\.net\.(?:fc\d|layer_norm)_")


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Return LDM's name, without its prefix, of each of a UNet2DConditionModel's weights.

    Raises:
        ValueError: if LDM has no such layer, or does not count blocks of different depths.
    """
    names = list(names)
    layers = _layers(names)
    attended = {name.split(".attentions.")[0] for name in names if ".attentions." in name}
    found = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        found[name] = f"{_original_layer(layer, layers, attended)}.{kind}"
    return found


def _layers(names: Sequence[str]) -> int:
    """Return the residual blocks of each level on the way down."""
    depths: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            depths.setdefault(match[1], set()).add(match[2])
    counts = {len(found) for found in depths.values()}
    if len(counts) != 1:
        raise ValueError(
            f"the network has levels of {sorted(counts)} residual blocks, which the original "
            "layout does not count; it is for Stable Diffusion 1 and 2"
        )
    return counts.pop()


def _original_layer(layer: str, layers: int, attended: set[str]) -> str:
    for known, original in TOP.items():
        if layer == known or layer.startswith(f"{known}."):
            return f"{original}{_inner(known, layer.removeprefix(known))}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", layer)
    if match is None:
        raise ValueError(
            f"the original layout has no name for {layer}; it is for Stable Diffusion 1 and 2"
        )
    way, block, part, index = match[1], int(match[2]), match[3], int(match[4])
    rest = layer[match.end() :]
    first = block * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op{rest.removeprefix('.conv')}"
    if part == "upsamplers":
        place = 2 if f"up_blocks.{block}" in attended else 1
        return f"output_blocks.{first + layers}.{place}{rest}"
    side, place = ("input", 1 + first + index) if way == "down" else ("output", first + index)
    return f"{side}_blocks.{place}.{int(part == 'attentions')}{_inner(part, rest)}"


def _inner(part: str, rest: str) -> str:
    """Return the rest of a name, dot first: a residual block's parts have other names."""
    return f".{RESNET[rest[1:]]}" if "resnets" in part else rest


def nemo_to_original(name: str) -> str:
    """Return LDM's name for one of NeMo's; LDM's own stay as they are."""
    for pattern, replacement in NEMO:
        name = re.sub(pattern, replacement, name)
    return name


def find_network(state: Mapping[str, Any], *, ema: bool) -> dict[str, Any]:
    """Return the U-Net's weights in a checkpoint of a whole model, under the file's own names.

    Args:
        ema: take averaged weights where the checkpoint has them. LDM keeps them under their
            names without dots: model_ema.diffusion_modelinput_blocks00weight.
    """
    found = {
        name[match.end() :]: tensor
        for name, tensor in state.items()
        if (match := BEFORE.match(name))
    }
    found = found or {name: state[name] for name in state if not AVERAGE.match(name)}
    averages = {
        name[match.end() :]: tensor
        for name, tensor in state.items()
        if ema and (match := AVERAGE.match(name))
    }
    partners = {name: name.replace(".", "") for name in found}
    if averages and all(short in averages for short in partners.values()):
        return {name: averages[short] for name, short in partners.items()}
    if averages:
        missing = next(name for name, short in partners.items() if short not in averages)
        warnings.warn(
            f"the averages in this file lack {missing}, so its plain weights are taken (say "
            "model.network.ema=false to mean them)",
            stacklevel=2,
        )
    return found


def write_original(pipeline: Path, folder: Path) -> bool:
    """Write the U-Net of a diffusers folder as folder/unet.safetensors, in LDM's names.

    Returns:
        Whether the original code has such a network; nothing is written otherwise.
    """
    index = pipeline / "model_index.json"
    if not index.is_file() or read_model_index(pipeline)["_class_name"] not in PIPELINES:
        return False
    weights = _read_unet(pipeline)
    try:
        names = original_names(weights)
    except ValueError:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{names[key]}": tensor for key, tensor in weights.items()}
    save_file(named, folder / FILE, metadata={"format": "pt"})
    return True


def unlike_original(pipeline: Path, folder: Path) -> list[str]:
    """Return the weights that diffusers, reading what `write_original` wrote, has otherwise."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with safe_open(folder / FILE, "pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    settings = read_json(pipeline / "unet" / "config.json")
    theirs = convert_ldm_unet_checkpoint(state, settings)
    ours = _read_unet(pipeline)
    same = {key for key in ours.keys() & theirs.keys() if torch.equal(ours[key], theirs[key])}
    return sorted((ours.keys() | theirs.keys()) - same)


def _read_unet(pipeline: Path) -> dict[str, Tensor]:
    files = sorted((pipeline / "unet").glob("*.safetensors"))
    parts = [read_tensors(file, str(file), allow_pickle=False) for file in files]
    return {key: tensor for part in parts for key, tensor in part.items()}
