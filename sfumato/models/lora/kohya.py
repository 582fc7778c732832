"""LoRA files in the layout of kohya's trainers, which ComfyUI reads for every family.

A key is the family's prefix, the layer's name there with _ for ., and lora_down.weight,
lora_up.weight or alpha. Where that name covers several layers of diffusers (q, k and v in one
matrix), the rows of `up` are theirs, one after another, in a block diagonal:

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
Places: TypeAlias = Mapping[str, tuple[str, ...]]  # a layer there: its layers here, by rows
AdapterState: TypeAlias = Mapping[str, Tensor]  # LAYER.lora_A.weight and LAYER.lora_B.weight


def same_names(names: Collection[str]) -> Places:
    """Return the layout that names layers as diffusers does."""
    return {name: (name,) for name in names}


def by_block(table: Places) -> Callable[[Collection[str]], Places]:
    """Return the layout of a table in which {} stands for the number of a block."""

    def places(names: Collection[str]) -> Places:
        found = {}
        for there, here in table.items():
            pattern = re.escape(here[0]).replace(r"\{\}", r"(\d+)")
            for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                block = match[1]
                found[there.format(block)] = tuple(name.format(block) for name in here)
        return found

    return places


@dataclass(frozen=True)
class KohyaLayout:
    """How a family's layers are named in kohya's files.

    Attributes:
        prefixes: by component; every text encoder among them is a CLIP.
        network: from the names of all layers of the network that predicts to their places.
    """

    prefixes: Mapping[str, str]
    network: Callable[[Collection[str]], Places] = same_names


def clip_name(layer: str) -> str:
    """Return a CLIP layer's name as files have it; transformers 5 drops `text_model.`."""
    if layer.startswith(("text_model.", "text_projection")):
        return layer
    return f"text_model.{layer}"


def kohya_state(
    adapters: Mapping[str, AdapterState],
    network: nn.Module,
    network_name: str,
    layout: KohyaLayout,
) -> dict[str, Tensor] | None:
    """Return the tensors of a file in kohya's layout; warn, and None, if a layer has no name there.

    Args:
        adapters: by component, alpha folded into B, text encoders by `clip_name`.
        network: the component that predicts, called `network_name`.
    """
    state: dict[str, Tensor] = {}
    nameless: list[str] = []
    for component, adapter in adapters.items():
        layers = [key.removesuffix(DOWN) for key in adapter if key.endswith(DOWN)]
        places = same_names(layers)
        if component == network_name:
            places = layout.network([name for name, _ in network.named_modules()])
        named = {name for here in places.values() for name in here}
        nameless += [layer for layer in layers if layer not in named]
        for there, here in places.items():
            if pair := _fuse(here, adapter, network):
                key = f"{layout.prefixes[component]}_{there.replace('.', '_')}"
                state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = pair
                state[f"{key}.alpha"] = torch.tensor(float(len(pair[0])))
    if not nameless:
        return state
    warnings.warn(
        f"{KOHYA_FILE} is not written: kohya's layout has no name for {len(nameless)} of the "
        f"adapted layers, such as {nameless[0]}; with model.lora.targets of attention and "
        "feed-forward layers it would be",
        stacklevel=2,
    )
    return None


def _fuse(
    here: tuple[str, ...], adapter: AdapterState, network: Any
) -> tuple[Tensor, Tensor] | None:
    """Return down and up of a layer there, or None if none of its layers is adapted.

    Readers that take the block diagonal apart expect a block for each layer, all of one rank: a
    layer without an adapter has zeros.
    """
    downs = {name: adapter[name + DOWN] for name in here if name + DOWN in adapter}
    if not downs:
        return None
    if len(here) == 1:
        return downs[here[0]], adapter[here[0] + UP]
    zero = torch.zeros_like(next(iter(downs.values())))
    ups = [
        adapter[name + UP]
        if name in downs
        else zero.new_zeros(network.get_submodule(name).out_features, len(zero))
        for name in here
    ]
    return torch.cat([downs.get(name, zero) for name in here]), torch.block_diag(*ups)
