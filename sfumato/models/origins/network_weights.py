"""Where a network's weights come from, alone: a run, a diffusers folder, an original file."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor, nn

from sfumato.config import ModelConfig, NetworkConfig
from sfumato.models.formats import PICKLES, WEIGHTS, read_json
from sfumato.models.origins.original import (
    FILE,
    TRANSFORMER_ENGINE,
    find_network,
    nemo_to_original,
    original_names,
)
from sfumato.models.origins.tensor_files import check_suffix, read_tensors
from sfumato.models.origins.unets import build_network

LISTED = 10
NETWORKS = ("unet", "transformer")  # folders of the network in a diffusers folder
DIFFUSERS_FILE = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Attributes:
        place: a checkpoint's folder, a network's folder of diffusers, or a file.
        unfinished: what is said of a run that is not complete; None where it is.
    """

    kind: Literal["checkpoint", "diffusers", "file"]
    place: Path
    unfinished: str | None = None


def check_start(config: ModelConfig) -> None:
    """Check that the weights a network starts from are there, and of a run that has ended.

    Raises:
        ValueError: if they are not.
    """
    if config.network.from_pretrained is not None:
        source = find_source(config)
        if source.unfinished is not None:
            raise ValueError(source.unfinished)
        if source.kind == "file":
            check_suffix(source.place, _said(config.network), allow_pickle=config.allow_pickle)


def without_start(config: ModelConfig) -> ModelConfig:
    """Return settings for a network whose weights all come from a checkpoint of its own run.

    What it started from need not be there any more.
    """
    return replace(config, network=replace(config.network, from_pretrained=None))


def find_source(config: ModelConfig) -> Source:
    """Return what model.network.from_pretrained names.

    Raises:
        ValueError: if there is no such thing, or it holds no weights.
    """
    said = _said(config.network)
    path = Path(str(config.network.from_pretrained)).expanduser()
    if path.is_file():
        return Source("file", path)
    if (path / "manifest.json").is_file():
        return Source("checkpoint", path)
    if (path / "config.yaml").is_file():
        return _last_of_run(path, said)
    if not path.exists():
        raise ValueError(f"{said} is not there; give a run folder, a diffusers folder or a file")
    for place in (path, *(path / name for name in NETWORKS)):
        if (place / "config.json").is_file() and list(place.glob(f"{DIFFUSERS_FILE}*")):
            return Source("diffusers", place)
    if (path / FILE).is_file():
        return Source("file", path / FILE)
    raise ValueError(
        f"{said} holds no network; give a run folder or one of its checkpoints, a diffusers folder "
        "or its unet/, or a file of weights"
    )


def _last_of_run(run: Path, said: str) -> Source:
    """Return the newest checkpoint of a run folder, and whether the run ended there."""
    steps = {
        int(place.name.removeprefix("step-")): place
        for place in (run / "checkpoints").glob("step-*")
        if place.name.removeprefix("step-").isdecimal() and place.is_dir()
    }
    if not steps:
        raise ValueError(f"{said} is a run without a checkpoint; train it first")
    try:
        wanted = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        last, whole = max(steps), int(wanted["training"]["max_steps"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{said}: its config.yaml is damaged ({error}); give one of its checkpoints instead"
        ) from error
    unfinished = (
        f"{said} is a run that did not finish: it has step {last} of {whole}. Let it go on "
        f"(sfumato train, with the same settings), or give {steps[last]} to start from there"
    )
    return Source("checkpoint", steps[last], unfinished if last < whole else None)


def blank_network(folder: Path, name: str) -> dict[str, nn.Module]:
    """Return a network at random, by its name, if its folder has settings and no weights."""
    if any(list(folder.glob(pattern)) for pattern in (*WEIGHTS, *PICKLES)):
        return {}
    return {name: build_network(read_json(folder / "config.json"))}


def check_whole(config: ModelConfig) -> None:
    """Refuse a network from elsewhere of which not every weight is trained.

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
        ValueError: if it cannot be read, or has not just the network's weights.
    """
    weights = read_weights(find_source(config), network, name, config)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            tensor.copy_(weights[key])


def read_weights(
    source: Source, network: nn.Module, name: str, config: ModelConfig
) -> dict[str, Tensor]:
    """Return weights under the names of a network, which are all there, and of its shapes.

    Raises:
        ValueError: if they cannot be read, or listing what is missing, unexpected or of another
            shape, in the names of the file.
    """
    said = _said(config.network)
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if source.kind == "checkpoint":
        given = _read_checkpoint(source.place, name, config.network, said)
    elif source.kind == "diffusers":
        given = _read_diffusers(source.place, config, said)
    else:
        state = read_tensors(source.place, said, allow_pickle=config.allow_pickle)
        given = find_network(state, ema=config.network.ema)
    layout = _layout(given, wanted, config.network, said)
    ours = {original: key for key, original in layout.items()}
    rename = (lambda key: key) if config.network.from_NeMo is False else nemo_to_original
    found = {ours.get(rename(key), key): tensor for key, tensor in given.items()}
    _compare(found, wanted, layout, said)
    return found


def _layout(
    given: Iterable[str], wanted: Iterable[str], network: NetworkConfig, said: str
) -> Mapping[str, str]:
    """Return the original layout's name of each wanted weight; nothing where diffusers' are given.

    Raises:
        ValueError: if the names are not those that are stated, or of a layout that is not read.
    """
    if not set(wanted).isdisjoint(given):
        if network.from_NeMo:
            raise ValueError(
                f"{said} has the names of diffusers, and model.network.from_NeMo = true; leave "
                "from_NeMo out, and names are looked at"
            )
        return {}
    odd = [key for key in given if TRANSFORMER_ENGINE.search(key)]
    if odd:
        raise ValueError(
            f"{said} has {len(odd)} layers of Transformer Engine's FP8 modules ({odd[0]}), which "
            "are not read; give a checkpoint that NeMo trained without them"
        )
    try:
        return original_names(wanted)
    except ValueError as error:
        raise ValueError(f"{said} has not the names of diffusers, and {error}") from error


def _compare(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    layout: Mapping[str, str],
    said: str,
) -> None:
    """Refuse weights that are not just those of the network.

    Raises:
        ValueError: listing what differs, in the names of the file.
    """
    missing = [layout.get(key, key) for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    reshaped = [
        f"{layout.get(key, key)}: {tuple(found[key].shape)} in the file, {tuple(shape)} here"
        for key, shape in wanted.items()
        if key in found and found[key].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    complaints = [
        f"{len(names)} weights are {kind} ({', '.join(names[:LISTED])}"
        f"{', ...' if len(names) > LISTED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if complaints:
        raise ValueError(
            f"{said} does not fit the network: {'; '.join(complaints)}. Give the weights of this "
            "network, or its settings as model.network.config (sd1, sd2 or a config.json)"
        )


def _read_checkpoint(
    place: Path, name: str, network: NetworkConfig, said: str
) -> dict[str, Tensor]:
    """Return a network's weights from a checkpoint of ours, averaged ones where asked and there.

    Raises:
        ValueError: if it is damaged, or holds adapters alone.
    """
    kinds = ("ema", "weights") if network.ema else ("weights",)
    files = (_unharmed(place, f"{kind}.safetensors", said) for kind in kinds)
    states = (read_tensors(file, said, allow_pickle=False) for file in files)
    state = next(filter(None, states), {})  # a run without an average has an empty one
    state = {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in state.items()
        if key.startswith(f"{name}.")
    }
    if not state or any(".lora_A." in key for key in state):
        raise ValueError(
            f"{said} holds no whole network, as the run trains adapters or text encoders alone; "
            "give its export/pipeline"
        )
    return state


def _unharmed(place: Path, name: str, said: str) -> Path:
    """Return a checkpoint's file if its bytes are those that its manifest tells of."""
    files = read_json(place / "manifest.json").get("files", {})
    try:
        with (place / name).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest == files[name]["sha256"]:
            return place / name
        fault = "differs from its SHA-256 in manifest.json"
    except (OSError, KeyError, TypeError) as error:
        fault = f"cannot be read ({error})"
    raise ValueError(f"{said}: {place / name} {fault}; give another checkpoint of the run")


def _read_diffusers(place: Path, config: ModelConfig, said: str) -> dict[str, Tensor]:
    """Return the weights in a network's folder, one file or several shards."""
    allow = config.allow_pickle
    names = (
        [DIFFUSERS_FILE] if config.network.ema else [f"{DIFFUSERS_FILE}.non_ema", DIFFUSERS_FILE]
    )
    if config.variant is not None:
        names = [f"{DIFFUSERS_FILE}.{config.variant}", *names]
    for name in names:
        base, dot, variant = name.partition(".")  # which an index has before its last ending
        for suffix in ("safetensors", "bin"):
            if (place / f"{name}.{suffix}").is_file():
                return read_tensors(place / f"{name}.{suffix}", said, allow_pickle=allow)
            index = place / f"{base}.{suffix}.index{dot}{variant}.json"
            if index.is_file():
                shards = sorted({*read_json(index)["weight_map"].values()})
                parts = [read_tensors(place / shard, said, allow_pickle=allow) for shard in shards]
                return {key: tensor for part in parts for key, tensor in part.items()}
    raise ValueError(
        f"{said}: {place} holds no {names[0]}.safetensors; name its variant as model.variant"
    )


def _said(network: NetworkConfig) -> str:
    return f"model.network.from_pretrained = {network.from_pretrained!r}"
