"""Writer of LoRA files in the layout of kohya's trainers, which ComfyUI reads for every family.

A key is the family's prefix, the layer's name in kohya's layout with _ for ., and
lora_down.weight, lora_up.weight or alpha. A layer that stacks several layers of diffusers (q, k
and v in one matrix) has their rows of `up` one after another, in a block diagonal:

    W_qkv + up down = (W_q + B_q A_q; W_k + B_k A_k; W_v + B_v A_v)

Sources: networks/lora.py, lora_flux.py and lora_sd3.py of kohya-ss/sd-scripts, networks/
lora_qwen_image.py of kohya-ss/musubi-tuner, comfy/lora.py of ComfyUI.
"""

import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

KOHYA_FILE = "kohya.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# kohya layer name -> the diffusers layers stacked in it, in row order
Stacks: TypeAlias = Mapping[str, tuple[str, ...]]
AdapterState: TypeAlias = Mapping[str, Tensor]  # LAYER.lora_A.weight and LAYER.lora_B.weight


def same_names(names: Collection[str]) -> Stacks:
    """Stack nothing, and name layers as diffusers does."""
    return {name: (name,) for name in names}


def by_block(table: Stacks) -> Callable[[Collection[str]], Stacks]:
    """Return a function like `same_names` for a table in which {} is the number of a block."""

    def stacks(names: Collection[str]) -> Stacks:
        by_name = {}
        for kohya, layers in table.items():
            pattern = re.escape(layers[0]).replace(r"\{\}", r"(\d+)")
            for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                by_name[kohya.format(match[1])] = tuple(name.format(match[1]) for name in layers)
        return by_name

    return stacks


@dataclass(frozen=True)
class KohyaLayout:
    """Names of a family's layers in kohya's files.

    Attributes:
        prefixes: by component; every text encoder among them is a CLIP.
        network: stacks the layers of the network that predicts, given all of their names.
    """

    prefixes: Mapping[str, str]
    network: Callable[[Collection[str]], Stacks] = same_names


def clip_name(layer: str) -> str:
    """Return a CLIP layer's name in files; transformers 5 drops `text_model.`."""
    if layer.startswith(("text_model.", "text_projection")):
        return layer
    return f"text_model.{layer}"


def kohya_state(
    adapters: Mapping[str, AdapterState],
    network: nn.Module,
    network_name: str,
    layout: KohyaLayout,
) -> dict[str, Tensor] | None:
    """Return the tensors of a file in kohya's layout.

    If a layer has no name in the layout, warn and return None.

    Args:
        adapters: by component, alpha folded into B, text encoders' layers by `clip_name`.
        network: the component that predicts, called `network_name`.
    """
    state: dict[str, Tensor] = {}
    nameless: list[str] = []
    for component, adapter in adapters.items():
        layers = [key.removesuffix(DOWN) for key in adapter if key.endswith(DOWN)]
        stacks = same_names(layers)
        if component == network_name:
            stacks = layout.network([name for name, _ in network.named_modules()])
        named = {name for names in stacks.values() for name in names}
        nameless += [layer for layer in layers if layer not in named]
        for name, stacked in stacks.items():
            if pair := _fuse(stacked, adapter, network):
                key = f"{layout.prefixes[component]}_{name.replace('.', '_')}"
                state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = pair
                state[f"{key}.alpha"] = torch.tensor(float(len(pair[0])))
    if not nameless:
        return state
    warnings.warn(
        f"{KOHYA_FILE} is not written: kohya's layout has no name for {len(nameless)} of the "
        f"adapted layers, such as {nameless[0]}; adapt only attention and feed-forward layers "
        "(model.lora.targets) to get the file",
        stacklevel=2,
    )
    return None


def _fuse(
    layers: tuple[str, ...], adapter: AdapterState, network: Any
) -> tuple[Tensor, Tensor] | None:
    """Return down and up of stacked layers, or None if none of the layers is adapted.

    Readers that take the block diagonal apart expect a block for each layer, all of one rank. A
    layer without an adapter therefore gets zeros.
    """
    downs = {name: adapter[name + DOWN] for name in layers if name + DOWN in adapter}
    if not downs:
        return None
    if len(layers) == 1:
        return downs[layers[0]], adapter[layers[0] + UP]
    zero = torch.zeros_like(next(iter(downs.values())))
    ups = [
        adapter[name + UP]
        if name in downs
        else zero.new_zeros(network.get_submodule(name).out_features, len(zero))
        for name in layers
    ]
    return torch.cat([downs.get(name, zero) for name in layers]), torch.block_diag(*ups)
