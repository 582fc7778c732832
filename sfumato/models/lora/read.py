"""LoRA files that are read, of every layout that diffusers converts.

A file changes a layer's weight W to

    W + (alpha / rank) up down

where it states alpha for each layer (kohya), in its metadata (peft), or not at all: alpha = rank.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FOLDER_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings, as JSON
PAIR = re.compile(r"(lora\w*\.(down|up)|lora_(down|up|A|B)(\.default)?)\.weight$|\.alpha$")
UPS = (
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora_B.default.weight",
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)


# What diffusers' converters raise at names and shapes that they do not expect.
CONVERSION_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight; a convolution has its kernel in `down`."""

    down: Float[Tensor, "r i *kernel"]
    up: Float[Tensor, "o r *one"]
    scale: float

    @property
    def delta(self) -> Float[Tensor, "o _"]:
        """The change, a convolution's weight flattened to a matrix."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1))

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not (self.down.any() and self.up.any())


LoraLayers: TypeAlias = dict[str, dict[str, LowRank]]  # by component, and layer there


@dataclass(frozen=True)
class LoraFile:
    """What a file says to a pipeline.

    Attributes:
        setting: that named the file, with its value, for messages.
        layers: by the names that the pipeline's networks have.
        strangers: other layers of the file, of which diffusers makes nothing here.
    """

    setting: str
    layers: LoraLayers
    strangers: list[str]


def lora_place(path: str) -> Path:
    """Return where the LoRA file of a path would be: there, or in that folder."""
    place = Path(path).expanduser()
    return place / FOLDER_FILE if place.is_dir() else place


def find_lora(path: str, setting: str) -> Path:
    """Return the LoRA file of a path: itself, or the one that diffusers names in a folder.

    Args:
        setting: whose value the path is, for messages.

    Raises:
        ValueError: if there is none, or only a pickled one.
    """
    file = lora_place(path)
    if not file.is_file():
        raise ValueError(
            f"{setting} = {path!r}: there is no file {file}; give a .safetensors file, or a folder "
            f"with {FOLDER_FILE}"
        )
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{setting} = {path!r} is no .safetensors file; pickled ones (.bin, .ckpt, .pt) can "
            "run code when they are loaded, so convert it first"
        )
    return file


def read_lora(pipeline: Any, network_name: str, path: str, setting: str) -> LoraFile:
    """Read a LoRA file of any layout that diffusers converts for this pipeline.

    Args:
        pipeline: its networks are looked at for their names alone, and need no adapters.
        network_name: the component that predicts.

    Raises:
        ValueError: if it cannot be read, or holds more than pairs of matrices.
    """
    file = find_lora(path, setting)
    said = f"{setting} = {path!r}"
    try:
        with safe_open(file, "pt") as tensors:
            notes: dict[str, Any] = json.loads((tensors.metadata() or {}).get(METADATA, "{}"))
            state = {key: tensors.get_tensor(key).float() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{said} is damaged ({error}); get it again") from error
    odd = [key for key, tensor in state.items() if not PAIR.search(key) and tensor.any()]
    if odd or any(value for key, value in notes.items() if key.endswith(".use_dora")):
        raise ValueError(
            f"{said} is no plain LoRA: {len(odd)} of its tensors are not of pairs of matrices"
            f"{such_as(odd)}; DoRA, LoHa, LoKr and changes of norms or biases are not read"
        )
    state = _fold_alphas({key: state[key] for key in state if PAIR.search(key)})

    def convert(given: dict[str, Tensor]) -> LoraLayers:
        return _convert(pipeline, network_name, given, notes)

    try:
        found = convert(state)
        return LoraFile(said, found, _lost(convert, state))
    except CONVERSION_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{said} could not be read as a LoRA file of a {type(pipeline).__name__} ({reason}); "
            "is it for another model?"
        ) from error


def such_as(names: Sequence[str]) -> str:
    """Return the first three names, to be put behind a count."""
    return f", such as {', '.join(names[:3])}" if names else ""


def _fold_alphas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same change with alpha = rank everywhere.

    diffusers 0.42 gives all attention layers of a U-Net one alpha, the commonest, where a file
    has several.
    """
    folded = dict(state)
    for key in state:
        base = key.removesuffix(".alpha")
        up = next((base + end for end in UPS if base + end in state), None)
        if base == key or up is None:
            continue
        rank = state[up].shape[1]
        folded[up] = state[up] * (state[key].item() / rank)
        folded[key] = torch.tensor(float(rank))
    return folded


def _convert(
    pipeline: Any, network_name: str, state: dict[str, Tensor], notes: Mapping[str, Any]
) -> LoraLayers:
    """Return the layers by the names of the pipeline's networks; what is of none is left out."""
    config = pipeline.components[network_name].config
    kind: Any = type(pipeline)
    read = kind.lora_state_dict(dict(state), unet_config=config, return_alphas=True)
    converted: dict[str, Tensor] = read[0] if isinstance(read, tuple) else read
    found: LoraLayers = {}
    for component, network in pipeline.components.items():
        start = f"{component}."
        tensors = {
            key.removeprefix(start): tensor
            for key, tensor in converted.items()
            if key.startswith(start) and not key.endswith(".alpha")
        }
        if not isinstance(network, nn.Module) or not tensors:
            continue
        names = {name for name, _ in network.named_modules()}
        tensors = _peft_names(tensors, is_network=component == network_name)
        found[component] = {}
        for layer in [key.partition(".lora_A.")[0] for key in tensors if ".lora_A." in key]:
            down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
            scale = _noted_scale(notes, component, layer, len(down))
            found[component][_own_name(layer, names)] = LowRank(down, up, scale)
    return found


def _peft_names(tensors: dict[str, Tensor], *, is_network: bool) -> dict[str, Tensor]:
    """Return the tensors of a component as LAYER.lora_A.weight and LAYER.lora_B.weight."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if all("lora_A" in key or "lora_B" in key for key in tensors):
        return tensors
    if is_network:
        return convert_unet_state_dict_to_peft(tensors)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))


def _own_name(layer: str, names: Collection[str]) -> str:
    """Return a layer's name in the network: transformers 5 drops `text_model.` from CLIP's."""
    bare = layer.removeprefix("text_model.")
    return next((name for name in (layer, bare, f"text_model.{bare}") if name in names), layer)


def _noted_scale(notes: Mapping[str, Any], component: str, layer: str, rank: int) -> float:
    """Return alpha / rank as peft's settings in a file's metadata say it; 1 without them."""
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in notes.items()
        if key.startswith(f"{component}.")
    }
    alpha = own.get("lora_alpha", rank)
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):  # as peft reads patterns
            alpha = value
            break
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _lost(
    convert: Callable[[dict[str, Tensor]], LoraLayers], state: dict[str, Tensor]
) -> list[str]:
    """Return the layers that the conversion leaves out, found by sending numbers through.

    diffusers drops what it does not know without an error, T5's layers of a Flux file for one.
    Zeros may get lost: they change nothing.
    """
    keys = [key for key in state if not key.endswith(".alpha")]
    numbered = {key: torch.full_like(state[key], i) for i, key in enumerate(keys, 1)}
    found = convert({**state, **numbered})
    kept = {
        int(tensor.flatten()[0])
        for layers in found.values()
        for layer in layers.values()
        for tensor in (layer.down, layer.up)
    }
    lost = [key for i, key in enumerate(keys, 1) if i not in kept and state[key].any()]
    return list(dict.fromkeys(PAIR.sub("", key).rstrip("._") for key in lost))
