"""Assembly of a diffusers folder from components that lie elsewhere, for a U-Net without weights.

The folder is $SFUMATO_CACHE/models/KEY, where KEY is a hash of the settings and the files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.clip import (
    OPEN_CLIP,
    OPEN_CLIP_CONFIG,
    check_suffix,
    fetch_open_clip,
    is_open_clip,
    read_files,
    read_open_clip,
    read_tensors,
    weight_files,
)
from sfumato.config import ModelConfig
from sfumato.files import new_folder, read_object
from sfumato.models.autoencoder_kl import downsampling
from sfumato.models.formats import find_model
from sfumato.models.origins.conversion import (
    is_vit_h,
    write_autoencoder,
    write_json,
    write_open_clip,
    write_text_encoder,
)
from sfumato.models.origins.unets import unet_settings

FORMAT = 3  # of the folders; a new number builds all of them again
# What Stable Diffusion 1 and 2 are sampled with; both have these betas.
SCHEDULER: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
INDEX: Mapping[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TEXT = "text_encoder"
CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_END = ".index.json"
CLIP_VOCABULARY = ("vocab.json", "merges.txt")
TOKENIZER_FILES = {
    *(*CLIP_VOCABULARY, "tokenizer.json"),
    *("special_tokens_map.json", "tokenizer_config.json"),
}
PICKLED_OPEN_CLIP = ("open_clip_pytorch_model.bin", "open_clip_model.bin")
DAMAGED = "download the model again"


class CacheError(ValueError):
    """The folder cannot be written."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}, or set the environment variable SFUMATO_CACHE to a folder")


@dataclass(frozen=True)
class Component:
    """A component that lies elsewhere.

    Attributes:
        setting: key and value that name the component.
        path: a folder, or a file of weights.
        kind: vae, text_encoder or tokenizer.
    """

    setting: str
    path: Path
    kind: str

    def files(self) -> list[Path]:
        """Return the component's files, sorted."""
        if self.path.is_file():
            beside = self.path.parent / OPEN_CLIP_CONFIG
            return [self.path, *([beside] if self.kind == TEXT and beside.is_file() else [])]
        return sorted(file for file in self.path.iterdir() if file.is_file() and self._owns(file))

    def _owns(self, file: Path) -> bool:
        if self.kind == "tokenizer":
            return file.name in TOKENIZER_FILES
        if file.name in ("config.json", OPEN_CLIP_CONFIG):
            return True
        return ".safetensors" in file.name or ".bin" in file.name

    def settings(self) -> dict[str, Any]:
        """Return the content of the folder's config.json."""
        file = self.path / "config.json"
        if not file.is_file():
            raise ValueError(
                f"{self.setting}: {self.path} has no config.json; give a folder that diffusers or "
                "transformers saved, or a file of weights"
            )
        return read_object(file, DAMAGED)


@dataclass(frozen=True)
class Components:
    """Everything that the folder is assembled from; `network` and `scheduler` are settings."""

    autoencoder: Component
    text_encoder: Component
    tokenizer: Component
    network: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def assemble_pipeline(config: ModelConfig) -> Path:
    """Return the diffusers folder of the components in the settings; write it if it is missing.

    Raises:
        ValueError: if a component is not named, missing or damaged, if the components do not fit
            together, or if the folder cannot be written.
    """
    components = _find(config)
    root = Path(os.environ.get("SFUMATO_CACHE") or "~/.cache/sfumato").expanduser()
    folder = root / "models" / _key(components, config)
    if not (folder / "model_index.json").is_file():
        with new_folder(folder, shared=True, failure=CacheError) as beside:
            _write(components, config, beside)
    return folder


# --- Finding


def _find(config: ModelConfig) -> Components:
    required = {"autoencoder": config.autoencoder, "text_encoder": config.text_encoder}
    missing = [f"model.{name}" for name, value in required.items() if value is None]
    if missing:
        raise ValueError(
            f"model.network.config = {config.network.config!r} builds only a network; give "
            f"{' and '.join(missing)} too"
        )
    text_encoder = str(config.text_encoder)
    name = "model.tokenizer" if config.tokenizer else "model.text_encoder"
    tokenizer = _component(name, config.tokenizer or text_encoder, "tokenizer", config)
    if tokenizer.path.is_file():  # an OpenCLIP file lies beside its vocabulary
        tokenizer = replace(tokenizer, path=tokenizer.path.parent)
    if not any((tokenizer.path / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        raise ValueError(
            f"{tokenizer.setting}: {tokenizer.path} has no vocab.json with merges.txt, and no "
            "tokenizer.json; give the folder of the tokenizer as model.tokenizer"
        )
    return Components(
        autoencoder=_component("model.autoencoder", str(config.autoencoder), "vae", config),
        text_encoder=_component("model.text_encoder", text_encoder, "text_encoder", config),
        tokenizer=tokenizer,
        network=unet_settings(str(config.network.config)),
        scheduler=SCHEDULER if config.scheduler is None else _scheduler(config.scheduler),
    )


def _scheduler(value: str) -> Mapping[str, Any]:
    """Return the settings of a scheduler's folder, or of the scheduler in a pipeline's folder."""
    path = Path(value).expanduser()
    for file in (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"):
        if file.is_file() and "_class_name" in (settings := read_object(file, DAMAGED)):
            return settings
    raise ValueError(
        f"model.scheduler = {value!r} holds no scheduler_config.json that names its class; give a "
        "folder that diffusers saved"
    )


def _component(key: str, value: str, kind: str, config: ModelConfig) -> Component:
    """Find a component: a file, a folder, or the folder of a pipeline that has the component."""
    setting = f"{key} = {value!r}"
    path = Path(value).expanduser()
    if path.is_file():
        check_suffix(path, setting, allow_pickle=config.allow_pickle)
        return Component(setting, path, kind)
    folder = find_model(
        value, allow_pickle=config.allow_pickle, variant=config.variant, setting=key
    )
    if kind == TEXT and _is_open_clip(folder):
        folder = fetch_open_clip(value, folder, key)
    is_pipeline = (folder / "model_index.json").is_file()
    return Component(setting, folder / kind if is_pipeline else folder, kind)


def _key(components: Components, config: ModelConfig) -> str:
    """Return a hash of the settings and of the files' names, sizes and modification times."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "network": dict(components.network),
        "scheduler": dict(components.scheduler),
        "prediction_type": config.prediction_type,
        "image_size": config.image_size,
        "variant": config.variant,
    }
    for part in (components.autoencoder, components.text_encoder, components.tokenizer):
        stats = [(file.name, file.stat()) for file in part.files()]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        content[part.kind] = [str(part.path.resolve()), files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


# --- Writing


def _write(components: Components, config: ModelConfig, folder: Path) -> None:
    vae = _write_vae(components.autoencoder, folder / "vae", config)
    text, pad = _write_encoder(components.text_encoder, folder / "text_encoder", config)
    length = int(text.get("max_position_embeddings", 77))
    _write_tokenizer(components.tokenizer, folder / "tokenizer", pad, length)
    _check_fit(components, vae, text)
    write_settings(config, folder, components.network, components.scheduler)


def write_settings(
    config: ModelConfig,
    folder: Path,
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any] = SCHEDULER,
) -> None:
    """Write the settings of network and scheduler, and model_index.json, beside an autoencoder.

    Raises:
        ValueError: if the autoencoder cannot divide `config.image_size`.
    """
    if config.image_size is not None:
        factor = downsampling(read_object(folder / "vae" / "config.json", DAMAGED))
        size = config.image_size
        if size % factor:
            raise ValueError(
                f"model.image_size = {size} must be a multiple of {factor} pixels; the nearest is "
                f"{max(factor, round(size / factor) * factor)}"
            )
        network = {**network, "sample_size": size // factor}
    write_json(folder / "unet" / "config.json", network)
    scheduler = {**scheduler, "prediction_type": config.prediction_type}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {**INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
    write_json(folder / "model_index.json", index)


def _write_vae(part: Component, folder: Path, config: ModelConfig) -> dict[str, Any]:
    if part.path.is_file():
        state = read_tensors(part.path, part.setting, allow_pickle=config.allow_pickle)
        write_autoencoder(state, folder, part.setting)
        return read_object(folder / "config.json", DAMAGED)
    settings = part.settings()
    kind = settings.get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{part.setting}: {part.path / 'config.json'} is of {kind or 'no class'}; give an "
            "AutoencoderKL"
        )
    _link(part.files(), folder)
    return settings


def _write_encoder(
    part: Component, folder: Path, config: ModelConfig
) -> tuple[dict[str, Any], int | None]:
    """Write a text encoder; return its settings, and the token that OpenCLIP fills up with."""
    from transformers import CLIPConfig

    allow, is_file = config.allow_pickle, part.path.is_file()
    home = part.path.parent if is_file else part.path
    if is_file or _is_open_clip(home):
        stated = read_open_clip(home) if is_open_clip(home) else None
        files = (part.path,) if is_file else weight_files(home, (*OPEN_CLIP, *PICKLED_OPEN_CLIP))
        state = read_files(files or (home / OPEN_CLIP[0],), part.setting, allow_pickle=allow)
        return write_open_clip(state, stated, folder, part.setting)
    settings = part.settings()
    kind = settings.get("model_type")
    if kind == "clip_text_model":
        _link(part.files(), folder)
        return settings, None
    if kind != "clip":
        raise ValueError(
            f"{part.setting}: {part.path / 'config.json'} is of {kind or 'no model'}; give a CLIP"
        )
    files = weight_files(part.path, CLIP_FILES) or (part.path / CLIP_FILES[0],)
    state = read_files(files, part.setting, allow_pickle=allow)
    whole: Any = CLIPConfig.from_pretrained(part.path)
    text, pad = whole.text_config, None
    tower = {key: t for key, t in state.items() if key.startswith("text_model.")}
    if is_vit_h(whole):
        text.num_hidden_layers -= 1  # Stable Diffusion 2 reads the layer before the last
        last, pad = f"text_model.encoder.layers.{text.num_hidden_layers}.", 0
        tower = {key: t for key, t in tower.items() if not key.startswith(last)}
    return write_text_encoder(text, tower, folder), pad


def _is_open_clip(folder: Path) -> bool:
    """Say whether a folder holds OpenCLIP's layout, and not transformers' too."""
    config = folder / "config.json"
    kind = read_object(config, DAMAGED).get("model_type") if config.is_file() else None
    has_weights = any((folder / f"{n}{e}").is_file() for n in CLIP_FILES for e in ("", INDEX_END))
    is_whole = kind == "clip_text_model" or (kind == "clip" and has_weights)
    return is_open_clip(folder) and not is_whole


def _check_fit(components: Components, vae: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    network = components.network
    expected, width = network.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if expected != width:
        raise ValueError(
            f"{components.text_encoder.setting} gives states of {width} numbers, and the network "
            f"of model.network.config reads {expected}: sd1 takes OpenAI's CLIP ViT-L/14 (768), "
            "sd2 OpenCLIP's ViT-H/14 (1024)"
        )
    expected, channels = network.get("in_channels", 4), vae.get("latent_channels", 4)
    if expected != channels:
        raise ValueError(
            f"{components.autoencoder.setting} gives latents of {channels} channels, and the "
            f"network of model.network.config reads {expected}; give another autoencoder or network"
        )


def _write_tokenizer(part: Component, folder: Path, pad: int | None, length: int) -> None:
    """Write a CLIP tokenizer.

    Args:
        pad: the token that fills up prompts, as OpenCLIP has one; None is the tokenizer's own, or
            the end token, as in OpenAI's CLIP.
        length: tokens that the text encoder reads.
    """
    if pad is None and (part.path / "tokenizer_config.json").is_file():
        _link(part.files(), folder)
        return
    files = [part.path / name for name in CLIP_VOCABULARY]
    if not all(file.is_file() for file in files):
        raise ValueError(
            f"{part.setting}: {part.path} lacks vocab.json or merges.txt, which OpenCLIP's "
            "tokenizer needs; give a folder with both as model.tokenizer"
        )
    _link(files, folder)
    end = "<|endoftext|>"
    tokens = {number: token for token, number in read_object(files[0], DAMAGED).items()}
    if pad is not None and pad not in tokens:
        raise ValueError(
            f"{files[0]} has no token {pad}, with which the text encoder's prompts are filled up; "
            "give the model's own tokenizer as model.tokenizer"
        )
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if pad is None else tokens[pad],
        "model_max_length": length,
        "errors": "replace",
        "add_prefix_space": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _link(files: Iterable[Path], folder: Path) -> None:
    """Link files into a folder: hard, or symbolic, or as copies where links fail."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        source, target = file.resolve(), folder / file.name  # the hub's cache has links
        for link in (target.hardlink_to, target.symlink_to):
            try:
                link(source)
                break
            except OSError:
                continue
        else:
            shutil.copy(source, target)
