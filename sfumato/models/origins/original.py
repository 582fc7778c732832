"""Names of a U-Net's weights in the original code: CompVis' LDM, and NeMo, which derives from it.

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.clip import read_files
from sfumato.files import read_object
from sfumato.models.formats import read_model_index

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
# NeMo's names, none of which is LDM's, so that LDM's names stay unchanged.
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
# Prefixes of the network's names, with the wrappers of NeMo and torch.compile.
BEFORE = re.compile(r"(?:(?:model|module|_orig_mod)\.)*diffusion_model\.(?:_orig_mod\.)?")
AVERAGE = re.compile(r"(?:model\.)*model_ema\.(?:_orig_mod)?(?:diffusion_model)?(?:_orig_mod)?")
TRANSFORMER_ENGINE = re.compile(r"\.norm_to_q\.|\.ff\.net\.(?:fc\d|layer_norm)_")


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Return LDM's name, without its prefix, of each of a UNet2DConditionModel's weights.

    Raises:
        ValueError: if LDM has no such layer, or the levels differ in their number of blocks.
    """
    names = list(names)
    layers = _layers(names)
    attended = {name.split(".attentions.")[0] for name in names if ".attentions." in name}
    originals = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        originals[name] = f"{_original_layer(layer, layers, attended)}.{kind}"
    return originals


def _layers(names: Sequence[str]) -> int:
    """Return the number of residual blocks in each level of the down blocks."""
    depths: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            depths.setdefault(match[1], set()).add(match[2])
    counts = {len(blocks) for blocks in depths.values()}
    if len(counts) != 1:
        raise ValueError(
            f"the network has levels of {sorted(counts)} residual blocks, and the original layout "
            "needs one number for all; it is for Stable Diffusion 1 and 2"
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
        position = 2 if f"up_blocks.{block}" in attended else 1
        return f"output_blocks.{first + layers}.{position}{rest}"
    side, number = ("input", 1 + first + index) if way == "down" else ("output", first + index)
    return f"{side}_blocks.{number}.{int(part == 'attentions')}{_inner(part, rest)}"


def _inner(part: str, rest: str) -> str:
    """Return the rest of a name, dot first; the layers of residual blocks are renamed."""
    return f".{RESNET[rest[1:]]}" if "resnets" in part else rest


def nemo_to_original(name: str) -> str:
    """Return LDM's name for a name of NeMo's or LDM's."""
    for pattern, replacement in NEMO:
        name = re.sub(pattern, replacement, name)
    return name


def find_network(state: Mapping[str, Any], *, ema: bool) -> dict[str, Any]:
    """Return the U-Net's weights in a checkpoint of a whole model, under the file's own names.

    Args:
        ema: take averaged weights if the checkpoint has them. LDM stores them by names without
            dots: model_ema.diffusion_modelinput_blocks00weight.
    """
    plain, averages = _below(BEFORE, state), _below(AVERAGE, state) if ema else {}
    plain = plain or {name: state[name] for name in state if not AVERAGE.match(name)}
    short = {name: name.replace(".", "") for name in plain}
    missing = [name for name in plain if short[name] not in averages]
    if averages and not missing:
        return {name: averages[short[name]] for name in plain}
    if averages:
        warnings.warn(
            f"the averages in this file lack {missing[0]}, so its plain weights are used (set "
            "model.network.ema=false to choose them)",
            stacklevel=2,
        )
    return plain


def _below(prefix: re.Pattern[str], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    matches = {name: match.end() for name in state if (match := prefix.match(name))}
    return {name[end:]: state[name] for name, end in matches.items()}


def write_original(pipeline: Path, folder: Path) -> bool:
    """Write the U-Net of a diffusers folder as folder/unet.safetensors, in LDM's names.

    Returns:
        Whether the original code has such a network. If not, nothing is written.
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
    """Return the names of weights that diffusers reads differently from `write_original`'s file."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = load_file(folder / FILE)
    settings = read_object(pipeline / "unet" / "config.json", "export again")
    theirs = convert_ldm_unet_checkpoint(state, settings)
    ours = _read_unet(pipeline)
    same = {key for key in ours.keys() & theirs.keys() if torch.equal(ours[key], theirs[key])}
    return sorted((ours.keys() | theirs.keys()) - same)


def _read_unet(pipeline: Path) -> dict[str, Tensor]:
    folder = pipeline / "unet"
    return read_files(sorted(folder.glob("*.safetensors")), str(folder), allow_pickle=False)
