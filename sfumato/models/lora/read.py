"""Reader of LoRA files in every layout that diffusers converts.

A file changes a layer's weight W to

    W + (alpha / rank) up down

with alpha stated for each layer (kohya), in the metadata (peft), or not at all: alpha = rank.
"""

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

from sfumato.files import parse_object
from sfumato.models.lora.peft_folder import (
    PEFT_FILE,
    PREFIX,
    SETTINGS,
    bare_name,
    by_pattern,
    component_of,
    rank_of,
    read_settings,
)
from sfumato.weights import refuse_non_finite

FOLDER_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the key of peft's settings, as JSON
PAIR = re.compile(r"(lora\w*\.(down|up)|lora_(down|up|A|B)(\.default)?)\.weight$|\.alpha$")
UPS = (
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora_B.default.weight",
    ".lora.up.weight",
    "_lora.up.weight",
    ".lora_linear_layer.up.weight",
)
# What diffusers' converters raise for unexpected names and shapes.
CONVERSION_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, NotImplementedError),
)


@dataclass(frozen=True)
class LowRank:
    """Change of one layer's weight; `down` has the kernel of a convolution."""

    down: Float[Tensor, "r i *kernel"]
    up: Float[Tensor, "o r *one"]
    scale: float

    @property
    def delta(self) -> Float[Tensor, "o _"]:
        """The change as a matrix; a convolution's weight is flattened."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1))

    @property
    def is_zero(self) -> bool:
        """Whether the layer is not changed."""
        return not (self.down.any() and self.up.any())


LoraLayers: TypeAlias = dict[str, LowRank]  # by COMPONENT.LAYER


@dataclass(frozen=True)
class LoraFile:
    """A file's changes of a pipeline's networks.

    Attributes:
        setting: key and value that named the file, for messages.
        layers: by the names in the pipeline's networks, such as unet.conv_in.
        strangers: the file's other layers, which diffusers does not convert for this pipeline.
    """

    setting: str
    layers: LoraLayers
    strangers: list[str]


def lora_path(value: str) -> Path:
    """Return the path of a LoRA file: a folder has it under diffusers' name, or under peft's."""
    path = Path(value).expanduser()
    if not path.is_dir():
        return path
    names = (FOLDER_FILE, PEFT_FILE)
    return next((path / name for name in names if (path / name).exists()), path / FOLDER_FILE)


def find_lora(path: str, setting: str) -> Path:
    """Return the LoRA file of a path, which may be a folder that diffusers or peft wrote.

    Args:
        setting: whose value the path is, for messages.

    Raises:
        ValueError: if the file does not exist, is a pickle, or lies beside peft's settings of
            something else than a plain LoRA.
    """
    file = lora_path(path)
    if not file.is_file():
        raise ValueError(
            f"{setting} = {path!r}: there is no file {file}; give a .safetensors file, or a folder "
            f"with {FOLDER_FILE}, or with peft's {PEFT_FILE} and {SETTINGS} (a pickled "
            "adapter_model.bin can run code, so convert it first)"
        )
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{setting} = {path!r} is no .safetensors file; loading pickled files (.bin, .ckpt, "
            ".pt) can run code, so convert it first"
        )
    read_settings(file, f"{setting} = {path!r}")
    return file


def read_lora(pipeline: Any, network_name: str, path: str, setting: str) -> LoraFile:
    """Read a LoRA file of any layout that diffusers converts for this pipeline, or of peft's.

    Args:
        pipeline: whose networks' names are compared; no adapters are needed.
        network_name: the component that predicts.

    Raises:
        ValueError: if the file cannot be read, or holds more than pairs of matrices.
    """
    file = find_lora(path, setting)
    setting = f"{setting} = {path!r}"
    try:
        with safe_open(file, "pt") as tensors:
            noted = parse_object((tensors.metadata() or {}).get(METADATA, "{}"))
            state = {key: tensors.get_tensor(key).float() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{setting} is damaged ({error}); get it again") from error
    if noted is None:
        raise ValueError(f"{setting} is damaged: its {METADATA} is no JSON object; get it again")
    odd = [key for key, tensor in state.items() if not PAIR.search(key) and tensor.any()]
    if odd or any(value for key, value in noted.items() if key.endswith(".use_dora")):
        raise ValueError(
            f"{setting} is no plain LoRA: {len(odd)} of its tensors are not of pairs of matrices"
            f"{such_as(odd)}; DoRA, LoHa, LoKr and changes of norms or biases are not read"
        )
    refuse_non_finite(state.items(), setting)
    folder = None if noted else read_settings(file, setting)
    if any(key.startswith(PREFIX) for key in state):
        state, noted, folder = _of_peft(pipeline, network_name, state, file, setting)
    elif folder is not None and not any(key.endswith(".alpha") for key in state):
        components = pipeline._lora_loadable_modules
        noted = {f"{name}.{key}": value for name in components for key, value in folder.items()}
    else:
        folder = None
    state = _fold_alphas({key: state[key] for key in state if PAIR.search(key)})

    def convert(state: dict[str, Tensor]) -> LoraLayers:
        return _convert(pipeline, network_name, state, noted)

    try:
        found = LoraFile(setting, convert(state), _lost(convert, state))
    except CONVERSION_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{setting} could not be read as a LoRA file of a {type(pipeline).__name__} "
            f"({reason}); is it for another model?"
        ) from error
    _check_ranks(found, folder)
    return found


def _of_peft(
    pipeline: Any, network_name: str, state: Mapping[str, Tensor], file: Path, setting: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return tensors and settings of a file of peft's by the component, and the bare settings."""
    settings = read_settings(file, setting)
    if settings is None:
        raise ValueError(
            f"{setting} has peft's names, and no {SETTINGS} beside it, which states alpha; copy it "
            "there from the folder that peft saved"
        )
    names = sorted(pipeline._lora_loadable_modules, key=lambda name: name != network_name)
    networks = {name: pipeline.components[name] for name in names}
    layers = {
        n: {layer for layer, _ in each.named_modules()} for n, each in networks.items() if each
    }
    kinds = {name: type(networks[name]).__name__ for name in layers}
    component = component_of(
        state,
        kinds,
        settings,
        file,
        lambda name, layer: _own_name(layer, layers[name]) in layers[name],
    )
    state = {f"{component}.{bare_name(key)}": tensor for key, tensor in state.items()}
    return state, {f"{component}.{key}": value for key, value in settings.items()}, settings


def _check_ranks(file: LoraFile, settings: Mapping[str, Any] | None) -> None:
    """Refuse settings of peft's that lie beside another adapter."""
    if settings is None:
        return
    for name, change in file.layers.items():
        layer = name.partition(".")[2]
        stated = [rank_of(settings, each) for each in (layer, f"text_model.{layer}")]
        if len(change.down) not in stated:
            raise ValueError(
                f"{file.setting} has rank {len(change.down)} at {name}, and the {SETTINGS} beside "
                f"it states {stated[0]}; these settings are of another adapter, remove them or "
                "put the right ones there"
            )


def such_as(names: Sequence[str]) -> str:
    """Return the first three names, to follow a count in a message."""
    return f", such as {', '.join(names[:3])}" if names else ""


def _fold_alphas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same change with alpha = rank in all layers.

    If a file has several values of alpha, diffusers 0.42 gives all attention layers of a U-Net
    the most common one.
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
    pipeline: Any, network_name: str, state: dict[str, Tensor], peft: Mapping[str, Any]
) -> LoraLayers:
    """Return the layers by the names in the pipeline's networks, without layers of no network."""
    config = pipeline.components[network_name].config
    kind: Any = type(pipeline)
    read = kind.lora_state_dict(dict(state), unet_config=config, return_alphas=True)
    converted: dict[str, Tensor] = read[0] if isinstance(read, tuple) else read
    layers: LoraLayers = {}
    for component, network in pipeline.components.items():
        tensors = _below(f"{component}.", converted)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
        if not isinstance(network, nn.Module) or not tensors:
            continue
        names = {name for name, _ in network.named_modules()}
        tensors = _peft_names(tensors, is_network=component == network_name)
        for layer in [key.partition(".lora_A.")[0] for key in tensors if ".lora_A." in key]:
            down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
            scale = _peft_scale(_below(f"{component}.", peft), layer, len(down))
            layers[f"{component}.{_own_name(layer, names)}"] = LowRank(down, up, scale)
    return layers


def _below(prefix: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries whose keys begin with a prefix, by the rest of their keys."""
    return {k.removeprefix(prefix): value for k, value in content.items() if k.startswith(prefix)}


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
    """Return a layer's name in the network: transformers 5 drops CLIP's `text_model.`."""
    bare = layer.removeprefix("text_model.")
    return next((name for name in (layer, bare, f"text_model.{bare}") if name in names), layer)


def _peft_scale(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha / rank by a component's peft settings; 1 without settings."""
    alpha = by_pattern(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _lost(
    convert: Callable[[dict[str, Tensor]], LoraLayers], state: dict[str, Tensor]
) -> list[str]:
    """Return the layers that the conversion drops.

    diffusers drops unknown layers without an error, such as T5's in a Flux file. To find them, each
    tensor is filled with a label of its own, and the labels that survive the conversion are
    collected. Layers of zeros change nothing and are not reported.
    """
    keys = [key for key in state if not key.endswith(".alpha")]
    labelled = {key: torch.full_like(state[key], i) for i, key in enumerate(keys, 1)}
    survivors = {
        int(tensor.flatten()[0])
        for layer in convert({**state, **labelled}).values()
        for tensor in (layer.down, layer.up)
    }
    lost = [key for i, key in enumerate(keys, 1) if i not in survivors and state[key].any()]
    return list(dict.fromkeys(PAIR.sub("", key).rstrip("._") for key in lost))
