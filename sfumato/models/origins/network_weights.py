"""Weights that a network starts from: a run, a diffusers folder or a file of the original code."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.clip import check_suffix, read_files, read_tensors
from sfumato.config import ModelConfig, NetworkConfig
from sfumato.config.saved import read_saved
from sfumato.files import read_object, sha256_of
from sfumato.models.formats import PICKLES, WEIGHTS
from sfumato.models.origins.original import (
    FILE,
    TRANSFORMER_ENGINE,
    find_network,
    nemo_to_original,
    original_names,
)
from sfumato.models.origins.unets import build_network
from sfumato.weights import Shards, differences, refuse_non_finite, shard_files

NETWORKS = ("unet", "transformer")  # folders of the network in a diffusers folder
DIFFUSERS_FILE = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """Where weights lie.

    Attributes:
        setting: key and value that name the source.
        path: a checkpoint's folder, a network's folder of diffusers, or a file.
        unfinished: the message about a run that did not finish; None if it finished.
    """

    setting: str
    kind: Literal["checkpoint", "diffusers", "file"]
    path: Path
    unfinished: str | None = None


def check_start(config: ModelConfig) -> None:
    """Check that the weights a network starts from exist, and that their run finished.

    Raises:
        ValueError: if they do not exist, or the run did not finish.
    """
    if config.network.from_pretrained is not None:
        source = find_source(config)
        if source.unfinished is not None:
            raise ValueError(source.unfinished)
        if source.kind == "file":
            check_suffix(source.path, source.setting, allow_pickle=config.allow_pickle)


def without_start(config: ModelConfig) -> ModelConfig:
    """Return settings for a network whose weights come from a checkpoint of its own run.

    The weights that the run started from may be gone.
    """
    return replace(config, network=replace(config.network, from_pretrained=None))


def find_source(config: ModelConfig) -> Source:
    """Return the source that model.network.from_pretrained names.

    Raises:
        ValueError: if the source does not exist, or holds no weights.
    """
    value = config.network.from_pretrained
    setting, path = f"model.network.from_pretrained = {value!r}", Path(str(value)).expanduser()
    if path.is_file():
        return Source(setting, "file", path)
    if (path / "manifest.json").is_file():
        return Source(setting, "checkpoint", path)
    if (path / "config.yaml").is_file():
        return _last_of_run(path, setting)
    if not path.exists():
        raise ValueError(
            f"{setting} does not exist; give a run folder, a diffusers folder or a file"
        )
    for folder in (path, *(path / name for name in NETWORKS)):
        if (folder / "config.json").is_file() and list(folder.glob(f"{DIFFUSERS_FILE}*")):
            return Source(setting, "diffusers", folder)
    if (path / FILE).is_file():
        return Source(setting, "file", path / FILE)
    raise ValueError(
        f"{setting} holds no network; give a run folder or one of its checkpoints, a diffusers "
        "folder or its unet/, or a file of weights"
    )


def _last_of_run(run: Path, setting: str) -> Source:
    """Return the newest checkpoint of a run folder, and whether the run ended there."""
    steps = {
        int(folder.name.removeprefix("step-")): folder
        for folder in (run / "checkpoints").glob("step-*")
        if folder.name.removeprefix("step-").isdecimal() and folder.is_dir()
    }
    if not steps:
        raise ValueError(f"{setting} is a run without a checkpoint; train it first")
    advice = "give one of its checkpoints instead"
    try:
        last, total = max(steps), int(read_saved(run, advice)["training"]["max_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{setting}: its config.yaml is damaged ({error}); {advice}") from error
    unfinished = (
        f"{setting} is a run that did not finish: it has step {last} of {total}. Continue it "
        f"(sfumato train, with the same settings), or give {steps[last]} to start from there"
    )
    return Source(setting, "checkpoint", steps[last], unfinished if last < total else None)


def blank_network(folder: Path, name: str) -> dict[str, nn.Module]:
    """Return a network with random weights, by its name, if its folder has settings only."""
    if any(list(folder.glob(pattern)) for pattern in (*WEIGHTS, *PICKLES)):
        return {}
    return {name: build_network(read_object(folder / "config.json", "remove its folder"))}


def check_whole(config: ModelConfig) -> None:
    """Refuse to train only a part of a network that comes from elsewhere.

    Raises:
        ValueError: naming the settings.
    """
    network = config.network
    if network.config is None and network.from_pretrained is None:
        return
    key = "config" if network.from_pretrained is None else "from_pretrained"
    raise ValueError(
        f"model.network.{key} = {vars(network)[key]!r} is for training the whole network, and "
        f"model.trainable = {config.trainable} with model.parts = {config.parts} does not; set "
        "model.trainable=full, or give a whole model as model.pretrained (export/pipeline of a run)"
    )


def start_network(network: nn.Module, name: str, config: ModelConfig) -> None:
    """Put the weights that model.network.from_pretrained names into a network.

    Args:
        name: of the component, such as unet.

    Raises:
        ValueError: if the weights cannot be read, or are not exactly the network's; the message
            lists what is missing, unexpected or of another shape, by the names in the file.
    """
    source, own = find_source(config), network.state_dict()
    if source.kind == "checkpoint":
        weights = _read_checkpoint(source, name, config.network)
    elif source.kind == "diffusers":
        weights = _read_diffusers(source, config)
    else:
        state = read_tensors(source.path, source.setting, allow_pickle=config.allow_pickle)
        weights = find_network(state, ema=config.network.ema)
    layout = _layout(weights, own, config.network, source.setting)
    diffusers_names = {original: key for key, original in layout.items()}
    rename = (lambda key: key) if config.network.from_NeMo is False else nemo_to_original
    weights = {diffusers_names.get(rename(key), key): tensor for key, tensor in weights.items()}
    advice = "give the weights of this network, or its settings as model.network.config"
    advice += " (sd1, sd2 or a config.json)"
    differences(weights, own, layout).refuse(source.setting, advice)
    refuse_non_finite(weights.items(), source.setting)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[key])


def _layout(
    names: Iterable[str], own: Iterable[str], network: NetworkConfig, setting: str
) -> Mapping[str, str]:
    """Return the original layout's name of each own weight; empty if the file has diffusers' names.

    Raises:
        ValueError: if the names contradict the settings, or are of a layout that is not read.
    """
    if not set(own).isdisjoint(names):
        if network.from_NeMo:
            raise ValueError(
                f"{setting} has the names of diffusers, and model.network.from_NeMo = true; leave "
                "from_NeMo out, so that the names decide"
            )
        return {}
    fp8 = [key for key in names if TRANSFORMER_ENGINE.search(key)]
    if fp8:
        raise ValueError(
            f"{setting} has {len(fp8)} layers of Transformer Engine's FP8 modules ({fp8[0]}), "
            "which are not read; give a checkpoint that NeMo trained without them"
        )
    try:
        return original_names(own)
    except ValueError as error:
        raise ValueError(f"{setting} does not have the names of diffusers, and {error}") from error


def _read_checkpoint(source: Source, name: str, network: NetworkConfig) -> dict[str, Tensor]:
    """Return a network's weights from a checkpoint of Sfumato: the averaged ones if asked for."""
    kinds = ("ema", "weights") if network.ema else ("weights",)
    states: Iterable[Mapping[str, Tensor]]
    if names := shard_files(source.path):
        shards = Shards([_verified(file, source.setting) for file in names])
        states = (shards.under(f"{kind}/") for kind in kinds)
    else:
        files = (_verified(source.path / f"{kind}.safetensors", source.setting) for kind in kinds)
        states = (read_tensors(file, source.setting, allow_pickle=False) for file in files)
    state = next(filter(None, states), {})  # the average of a run without one is empty
    prefix = f"{name}."
    state = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    if not state or any(".lora_A." in key for key in state):
        raise ValueError(
            f"{source.setting} holds no whole network, as the run trains only adapters or text "
            "encoders; give its export/pipeline"
        )
    return state


def _verified(path: Path, setting: str) -> Path:
    """Return a checkpoint's file if its SHA-256 is the one in the manifest."""
    advice = "give another checkpoint of the run"
    manifest = read_object(path.parent / "manifest.json", advice)
    try:
        found, expected = sha256_of(path), manifest["files"][path.name]["sha256"]
        if found == expected:
            return path
        fault = f"differs from its SHA-256 in manifest.json: {found}, not {expected}"
    except (OSError, KeyError, TypeError) as error:
        fault = f"cannot be read ({error})"
    raise ValueError(f"{setting}: {path} {fault}; {advice}")


def _read_diffusers(source: Source, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights in a network's folder, from one file or several shards."""
    folder, allow = source.path, config.allow_pickle
    names = [DIFFUSERS_FILE]
    if not config.network.ema:
        names = [f"{DIFFUSERS_FILE}.non_ema", *names]
    if config.variant is not None:
        names = [f"{DIFFUSERS_FILE}.{config.variant}", *names]
    for name in names:
        base, dot, variant = name.partition(".")  # an index has the variant before its last ending
        for suffix in ("safetensors", "bin"):
            files = [folder / f"{name}.{suffix}"]
            index = folder / f"{base}.{suffix}.index{dot}{variant}.json"
            if index.is_file() and not files[0].is_file():
                shards = read_object(index, "get the folder again")["weight_map"].values()
                files = [folder / shard for shard in sorted(set(shards))]
            elif not files[0].is_file():
                continue
            return read_files(files, source.setting, allow_pickle=allow)
    raise ValueError(
        f"{source.setting}: {folder} holds no {names[0]}.safetensors; name its variant as "
        "model.variant"
    )
