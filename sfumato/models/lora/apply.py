"""Application of LoRA files: merged into the base, continued by training, and written.

The base becomes

    W' = W + sum over the merged files of scale_i up_i down_i

for policy and reference alike. An adapter that training continues belongs to the policy only.
"""

import difflib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.config import MergeConfig, ModelConfig
from sfumato.models.adapters import LoraRoles, Roles
from sfumato.models.lora.kohya import KOHYA_FILE, KohyaLayout, clip_name, kohya_state
from sfumato.models.lora.read import LoraFile, LowRank, find_lora, lora_path, read_lora, such_as

START = "model.lora.start"


def check_lora_files(config: ModelConfig) -> None:
    """Check that the files to merge exist.

    Raises:
        ValueError: if one does not.
    """
    for name, merge in config.merge.items():
        find_lora(merge.path, f"model.merge.{name}.path")


@torch.no_grad()
def merge_files(pipeline: Any, network_name: str, merge: Mapping[str, MergeConfig]) -> set[str]:
    """Add LoRA files to the weights of a pipeline without adapters; return the changed components.

    The sum is taken in float32, whatever dtype the weights have.

    Raises:
        ValueError: if a file cannot be read, or has layers that the pipeline lacks.
    """
    known: dict[str, Any] = {
        f"{component}.{layer}": module
        for component in pipeline._lora_loadable_modules
        if (network := pipeline.components[component]) is not None
        for layer, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    changed = set()
    for file, scale in _read_merged(pipeline, network_name, merge):
        for name, change in _matched(file, known, "is the file for another model?").items():
            weight = known[name].weight
            _check_shape(file, name, change, weight)
            weight.copy_(weight.float() + scale * change.delta.reshape(weight.shape))
            changed.add(name.partition(".")[0])
    return changed


@torch.no_grad()
def start_adapters(
    pipeline: Any, network_name: str, components: Mapping[str, Roles], path: str
) -> None:
    """Start adapters from a file; adapters that the file lacks stay as drawn, with B = 0.

    A missing file gets a warning: it was read when the run began, and since then the checkpoints
    hold the adapters. `check_train` refuses to begin a run without the file.

    Raises:
        ValueError: if the file cannot be read, has layers that are not trained, or another rank.
    """
    if not lora_path(path).exists():
        warnings.warn(
            f"{START} = {path!r} does not exist any more: until a checkpoint is loaded, the "
            "adapters change nothing",
            stacklevel=2,
        )
        return
    trained: dict[str, Any] = {
        f"{component}.{layer}": adapter
        for component, roles in components.items()
        if isinstance(roles, LoraRoles)
        for layer, adapter in roles.adapters().items()
    }
    file = read_lora(pipeline, network_name, path, START)
    advice = (
        "train these layers too (model.parts, model.lora.targets, model.lora.encoder_targets), or "
        "merge the file into the base (model.merge) and train another adapter"
    )
    fresh = list(trained)
    for name, change in _matched(file, trained, advice).items():
        if not (change.down.any() or change.up.any()):
            continue  # two zero matrices would never get a gradient
        adapter = trained[name]
        down, up = (matrices["default"].weight for matrices in (adapter.lora_A, adapter.lora_B))
        if len(change.down) != len(down):
            raise ValueError(
                f"{file.setting} has rank {len(change.down)} at {name}, and model.lora.rank = "
                f"{len(down)}; set model.lora.rank={len(change.down)}, or merge the file into the "
                "base (model.merge) and train another adapter"
            )
        _check_shape(file, name, change, adapter.get_base_layer().weight)
        down.copy_(change.down.reshape(down.shape))
        up.copy_(change.up.reshape(up.shape) * (change.scale / adapter.scaling["default"]))
        fresh.remove(name)
    if fresh:
        warnings.warn(
            f"{file.setting} lacks {len(fresh)} of the {len(trained)} trained layers, which start "
            f"at zero{such_as(fresh)}",
            stacklevel=2,
        )


def fuse_elsewhere(pipeline: Any, network_name: str, merge: Mapping[str, MergeConfig]) -> None:
    """Merge LoRA files into a pipeline with diffusers' own arithmetic, to compare with ours."""
    for file, scale in _read_merged(pipeline, network_name, merge):
        changes = {name: each for name, each in file.layers.items() if not each.is_zero}
        downs = {f"{name}.lora_A.weight": each.down for name, each in changes.items()}
        ups = {f"{name}.lora_B.weight": each.up * each.scale for name, each in changes.items()}
        pipeline.load_lora_weights(downs | ups)
        pipeline.fuse_lora(sorted({name.partition(".")[0] for name in changes}), lora_scale=scale)
        pipeline.unload_lora_weights()


def save_adapters(
    folder: Path,
    pipeline: Any,
    network_name: str,
    components: Mapping[str, Roles],
    layout: KohyaLayout,
    merge: Mapping[str, MergeConfig],
) -> None:
    """Write the adapters in diffusers' layout, and in that of kohya and ComfyUI.

    Both files have alpha = rank, and name in their metadata what was merged into their base.
    """
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, roles in components.items():
        if isinstance(roles, LoraRoles):
            state = roles.adapter_state()
            if name != network_name:
                state = {clip_name(key): tensor for key, tensor in state.items()}
            adapters[name] = state
    metadata = {"format": "pt"}
    if merge:
        files = [{"file": Path(each.path).name, "scale": each.scale} for each in merge.values()]
        metadata["sfumato_merged_into_base"] = json.dumps(files)
    pipeline.save_lora_weights(
        folder,
        save_function=lambda state, file: save_file(state, file, metadata=metadata),
        **{f"{name}_lora_layers": state for name, state in adapters.items()},
    )
    network = components[network_name].policy
    if (state := kohya_state(adapters, network, network_name, layout)) is not None:
        save_file(state, folder / KOHYA_FILE, metadata=metadata)


def _read_merged(
    pipeline: Any, network_name: str, merge: Mapping[str, MergeConfig]
) -> Iterator[tuple[LoraFile, float]]:
    for name, each in merge.items():
        yield read_lora(pipeline, network_name, each.path, f"model.merge.{name}.path"), each.scale


def _matched(file: LoraFile, known: Mapping[str, Any], advice: str) -> dict[str, LowRank]:
    """Return the changes of a file by COMPONENT.LAYER; all of its layers must be known.

    Unknown layers of zeros are left out: some trainers and readers fill up with zeros.

    Raises:
        ValueError: naming unknown layers, and the nearest known names.
    """
    matched = {name: change for name, change in file.layers.items() if name in known}
    strangers = list(file.strangers)
    strangers += [n for n, each in file.layers.items() if n not in known and not each.is_zero]
    if matched and not strangers:
        return matched
    if not strangers:
        raise ValueError(f"{file.setting} holds no layer that changes anything; give another file")
    near = ", ".join(difflib.get_close_matches(strangers[0], known, 3, 0.0))
    count, without = str(len(strangers)), ""
    if matched:
        count = f"{count} of {len(strangers) + len(matched)}"
        rest = sorted(known.keys() - matched.keys())
        if rest:
            without = f"; the file lacks {len(rest)} of the model's {len(known)}{such_as(rest)}"
    raise ValueError(
        f"{file.setting}: {count} layers match none of the model{such_as(strangers)} (nearest: "
        f"{near}){without}; {advice}"
    )


def _check_shape(file: LoraFile, name: str, change: LowRank, weight: Tensor) -> None:
    """Refuse a change whose sides are not the weight's, or whose ranks differ."""
    rows, rank = change.up.shape[:2]
    sides = rows, change.down[0].numel()
    if (*sides, rank) != (len(weight), weight[0].numel(), len(change.down)):
        raise ValueError(
            f"{file.setting}: {name} is {sides[0]} x {sides[1]} in the file, of ranks {rank} and "
            f"{len(change.down)}, and {len(weight)} x {weight[0].numel()} in the model; it is for "
            "another model"
        )
