"""Reader of folders that peft saved: adapter_config.json beside the matrices.

The layers are named as in the network, after `base_model.model.`, without the component's name.
Alpha is stated in the settings alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.files import read_object

PEFT_FILE = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
_AGAIN = "save the adapter with peft again"
# Settings of how the adapter was trained, which change nothing of the finished one.
_IDLE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# The values with which a change of weights is plain; other settings must be off.
_PLAIN: Mapping[str, Sequence[Any]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the base before training (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read_settings(file: Path, setting: str) -> dict[str, Any] | None:
    """Return peft's settings beside a LoRA file; None if there are none.

    Args:
        setting: key and value that named the file, for messages.

    Raises:
        ValueError: they are damaged, or of an adapter that is no plain LoRA; naming the key.
    """
    path = file.parent / SETTINGS
    if not path.is_file():
        if file.name == PEFT_FILE:
            raise ValueError(
                f"{setting}: {path} is missing, which states alpha; copy it there from the folder "
                "that peft saved"
            )
        return None
    content = read_object(path, _AGAIN)
    for key, value in content.items():
        plain = _PLAIN.get(key)
        if key in _READ | _IDLE or (plain is None and not value) or (plain and value in plain):
            continue
        raise ValueError(
            f"{setting} is no plain LoRA: {path} states {key} = {value!r}, which is not read; "
            "merge the adapter with peft (merge_and_unload), and give the merged model"
        )
    numbers: dict[str, Any] = {"r": content.get("r"), "lora_alpha": content.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = content.get(name) or {}
        numbers |= patterns if isinstance(patterns, dict) else {name: patterns}
    for name, number in numbers.items():
        if type(number) not in (int, float) or not 0 < number < 2**31 or not _is_pattern(name):
            raise ValueError(f"{path} states {name} = {number!r}, no number above 0; {_AGAIN}")
    return content


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def rank_of(settings: Mapping[str, Any], layer: str) -> int:
    """Return the rank of a layer by peft's settings."""
    return by_pattern(settings.get("rank_pattern"), layer, settings["r"])


def by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that a layer's name matches, as peft reads patterns."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def bare_name(key: str) -> str:
    """Return a tensor's name as the network and diffusers have it."""
    return key.removeprefix(PREFIX).replace(".default.weight", ".weight")


def component_of(
    keys: Iterable[str],
    kinds: Mapping[str, str],
    settings: Mapping[str, Any],
    file: Path,
    has_layer: Callable[[str, str], bool],
) -> str:
    """Return the component that a file of peft's is for: the one that has its layers.

    Of several, it is the one after which the folder is named, or the one of the noted class. If
    none has all layers, it is the first, whose names then stand in the message.

    Args:
        kinds: class of each component, the one that predicts first.
        has_layer: says whether a component has a layer of this name.

    Raises:
        ValueError: the layers are those of several components alike.
    """
    layers = {bare_name(key).partition(".lora_")[0] for key in keys}
    fitting = [name for name in kinds if all(has_layer(name, layer) for layer in layers)]
    noted = (settings.get("auto_mapping") or {}).get("base_model_class")
    named = [name for name in fitting if name == file.parent.name]
    named = named or [name for name in fitting if kinds[name] == noted]
    if len(fitting) > 1 and len(named) != 1:
        raise ValueError(
            f"{file} fits {' and '.join(fitting)} alike; rename its folder to the one that it was "
            "trained for"
        )
    return [*named, *fitting, *kinds][0]
