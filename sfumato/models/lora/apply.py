"""What is done with LoRA files: training goes on from one, others are merged into the base.

The base becomes

    W' = W + sum over the merged files of scale_i up_i down_i

for policy and reference alike; an adapter that training goes on from is the policy's alone.
"""

import difflib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.config import MergeConfig, ModelConfig
from sfumato.models.adapters import LoraRoles, Roles
from sfumato.models.lora.kohya import KOHYA_FILE, KohyaLayout, clip_name, kohya_state
from sfumato.models.lora.read import (
    LoraFile,
    LowRank,
    find_lora,
    lora_place,
    read_lora,
    such_as,
)

START = "model.lora.start"


def check_lora_files(config: ModelConfig) -> None:
    """Check that the files to merge are there.

    Raises:
        ValueError: if one is not.
    """
    for name, merge in config.merge.items():
        find_lora(merge.path, f"model.merge.{name}.path")


@torch.no_grad()
def merge_files(pipeline: Any, network_name: str, merge: Mapping[str, MergeConfig]) -> set[str]:
    """Add LoRA files to the weights of a pipeline without adapters; return what components.

    The sum is taken in float32, whatever the weights are kept in.

    Raises:
        ValueError: if a file cannot be read, or has layers that the pipeline has not.
    """
    changed = set()
    for name, each in merge.items():
        file = read_lora(pipeline, network_name, each.path, f"model.merge.{name}.path")
        known = {
            component: _weighted_layers(network)
            for component in pipeline._lora_loadable_modules
            if (network := pipeline.components[component]) is not None
        }
        for component, layer, given in _matched(file, known, "is the file for another model?"):
            weight = known[component][layer].weight
            _check_shape(file, f"{component}.{layer}", given, weight)
            merged = weight.float() + each.scale * given.delta.reshape(weight.shape)
            weight.copy_(merged)
            changed.add(component)
    return changed


@torch.no_grad()
def start_adapters(pipeline: Any, network_name: str, parts: Mapping[str, Roles], path: str) -> None:
    """Let adapters begin as a file has them; those that it says nothing of stay as drawn, B = 0.

    A file that is gone is warned about: it was read when the run began, and since then the
    adapters are in the checkpoints. `check_train` refuses to begin without it.

    Raises:
        ValueError: if the file cannot be read, has layers that are not trained, or another rank.
    """
    if not lora_place(path).exists():
        warnings.warn(
            f"{START} = {path!r} is not there any more: until a checkpoint is loaded, the adapters "
            "change nothing",
            stacklevel=2,
        )
        return
    trained = {name: part.adapters() for name, part in parts.items() if isinstance(part, LoraRoles)}
    file = read_lora(pipeline, network_name, path, START)
    advice = (
        "let model.parts, model.lora.targets and model.lora.encoder_targets take them in, or merge "
        "the file into the base (model.merge) and train another adapter"
    )
    told = set()
    for component, layer, given in _matched(file, trained, advice):
        name, adapter = f"{component}.{layer}", trained[component][layer]
        if not (given.down.any() or given.up.any()):
            continue  # from two zero matrices no gradient leads away
        down, up = (part["default"].weight for part in (adapter.lora_A, adapter.lora_B))
        if len(given.down) != len(down):
            raise ValueError(
                f"{file.setting} has rank {len(given.down)} at {name}, and model.lora.rank = "
                f"{len(down)}; set model.lora.rank={len(given.down)}, or merge the file into the "
                "base (model.merge) and train another adapter"
            )
        _check_shape(file, name, given, adapter.get_base_layer().weight)
        down.copy_(given.down.reshape(down.shape))
        up.copy_(given.up.reshape(up.shape) * (given.scale / adapter.scaling["default"]))
        told.add(name)
    fresh = [name for name in _names(trained) if name not in told]
    if fresh:
        warnings.warn(
            f"{file.setting} says nothing of {len(fresh)} of the {len(fresh) + len(told)} trained "
            f"layers, which start at zero{such_as(fresh)}",
            stacklevel=2,
        )


def fuse_elsewhere(pipeline: Any, network_name: str, merge: Mapping[str, MergeConfig]) -> None:
    """Merge LoRA files into a pipeline with diffusers' own arithmetic, to compare ours with."""
    for name, each in merge.items():
        file = read_lora(pipeline, network_name, each.path, f"model.merge.{name}.path")
        state: dict[str, Tensor] = {}
        changed = set()
        for component, layers in file.layers.items():
            for layer, given in layers.items():
                if given.is_zero:
                    continue
                state[f"{component}.{layer}.lora_A.weight"] = given.down
                state[f"{component}.{layer}.lora_B.weight"] = given.up * given.scale
                changed.add(component)
        pipeline.load_lora_weights(state)
        pipeline.fuse_lora(sorted(changed), lora_scale=each.scale)
        pipeline.unload_lora_weights()


def save_adapters(
    folder: Path,
    pipeline: Any,
    network_name: str,
    parts: Mapping[str, Roles],
    layout: KohyaLayout,
    merge: Mapping[str, MergeConfig],
) -> None:
    """Write the adapters as diffusers reads them, and beside that as kohya and ComfyUI do.

    Both files have alpha = rank, and name in their metadata what was merged into their base.
    """
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        if isinstance(part, LoraRoles):
            state = part.adapter_state()
            if name != network_name:
                state = {clip_name(key): tensor for key, tensor in state.items()}
            adapters[name] = state
    notes = {"format": "pt"}
    if merge:
        files = [{"file": Path(each.path).name, "scale": each.scale} for each in merge.values()]
        notes["sfumato_merged_into_base"] = json.dumps(files)
    pipeline.save_lora_weights(
        folder,
        save_function=lambda state, file: save_file(state, file, metadata=notes),
        **{f"{name}_lora_layers": state for name, state in adapters.items()},
    )
    network = parts[network_name].policy
    if (state := kohya_state(adapters, network, network_name, layout)) is not None:
        save_file(state, folder / KOHYA_FILE, metadata=notes)


def _matched(
    file: LoraFile, known: Mapping[str, Mapping[str, Any]], advice: str
) -> list[tuple[str, str, LowRank]]:
    """Return component, name and change of each layer of a file; all of them must be known.

    What is zero in the file need not be: some trainers and readers fill up with it.

    Raises:
        ValueError: naming what is not, and what would be near.
    """
    names = set(_names(known))
    matched, strangers = [], list(file.strangers)
    for component, layers in file.layers.items():
        for layer, given in layers.items():
            if (name := f"{component}.{layer}") in names:
                matched.append((component, layer, given))
            elif not given.is_zero:
                strangers.append(name)
    if matched and not strangers:
        return matched
    if not strangers:
        raise ValueError(f"{file.setting} holds no layer that changes anything; give another file")
    near = ", ".join(difflib.get_close_matches(strangers[0], names, 3, 0.0))
    count, here = str(len(strangers)), ""
    if matched:
        rest = sorted(names.difference(f"{part}.{layer}" for part, layer, _ in matched))
        count = f"{count} of {len(strangers) + len(matched)}"
        if rest:
            here = f"; {len(rest)} of the {len(names)} here have none in the file{such_as(rest)}"
    raise ValueError(
        f"{file.setting}: {count} layers match none here{such_as(strangers)} (nearest: {near})"
        f"{here}; {advice}"
    )


def _names(layers: Mapping[str, Collection[str]]) -> list[str]:
    return [f"{component}.{layer}" for component, own in layers.items() for layer in own]


def _weighted_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers that a LoRA can change, by name."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def _check_shape(file: LoraFile, name: str, given: LowRank, weight: Tensor) -> None:
    out, rank = given.up.shape[:2]
    inner = given.down[0].numel()
    if (out, inner, rank) != (len(weight), weight[0].numel(), len(given.down)):
        raise ValueError(
            f"{file.setting}: {name} is {out} x {inner} in the file, of ranks {rank} and "
            f"{len(given.down)}, and {len(weight)} x {weight[0].numel()} here; it is for another "
            "model"
        )
