"""A diffusers folder put together of parts, for networks that begin at random.

An autoencoder, a text encoder and a tokenizer that lie elsewhere, a U-Net's settings without its
weights, and a scheduler's, under $SFUMATO_CACHE/models/KEY. KEY is a hash of all of them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sfumato.config import ModelConfig
from sfumato.models.autoencoder_kl import downsampling
from sfumato.models.formats import find_model, read_json
from sfumato.models.origins.conversion import write_autoencoder, write_open_clip, write_text_encoder
from sfumato.models.origins.tensor_files import check_suffix, read_tensors
from sfumato.models.origins.unets import blueprint

FORMAT = 2  # of the folders; another number makes all of them anew
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
VOCABULARY = {
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
VIT_H = {"hidden_size": 1024, "num_hidden_layers": 24}  # OpenCLIP's text tower in transformers


@dataclass(frozen=True)
class Part:
    """One part that lies elsewhere.

    Attributes:
        setting: key and value that name it.
        place: a folder, or a file.
        kind: vae, text_encoder or tokenizer.
    """

    setting: str
    place: Path
    kind: str

    def files(self) -> list[Path]:
        """Return the files that belong to it, in one order."""
        if self.place.is_file():
            return [self.place]
        return sorted(path for path in self.place.iterdir() if path.is_file() and self._has(path))

    def _has(self, file: Path) -> bool:
        if self.kind == "tokenizer":
            return file.name in VOCABULARY
        return file.name == "config.json" or ".safetensors" in file.name or ".bin" in file.name


@dataclass(frozen=True)
class Parts:
    """All of them, found."""

    autoencoder: Part
    text_encoder: Part
    tokenizer: Part
    network: Mapping[str, Any]
    scheduler: Mapping[str, Any]


def assemble_pipeline(config: ModelConfig) -> Path:
    """Return a diffusers folder of the parts that the settings name, made where it is not yet.

    Raises:
        ValueError: if a part is not named, not there or damaged, if they do not fit together, or
            if the folder cannot be written.
    """
    parts = _find(config)
    folder = cache_folder() / "models" / _key(parts, config)
    if (folder / "model_index.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:12]}.", dir=folder.parent))
        try:
            _write(parts, config, beside)
            _take_place(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the model's folder {folder} could not be written ({error}); make room, or set the "
            "environment variable SFUMATO_CACHE to another place"
        ) from error
    return folder


def cache_folder() -> Path:
    """Return where Sfumato keeps what it can make anew."""
    return Path(os.environ.get("SFUMATO_CACHE") or "~/.cache/sfumato").expanduser()


def _take_place(beside: Path, folder: Path) -> None:
    """Move a whole folder to its place, unless another process was faster."""
    try:
        beside.chmod(0o755)  # mkdtemp's folders are its owner's alone
        beside.rename(folder)
    except OSError:
        if not (folder / "model_index.json").is_file():
            raise


# --- Finding


def _find(config: ModelConfig) -> Parts:
    named = {"autoencoder": config.autoencoder, "text_encoder": config.text_encoder}
    missing = [f"model.{name}" for name, value in named.items() if value is None]
    if missing:
        raise ValueError(
            f"model.network.config = {config.network.config!r} builds a network alone; give "
            f"{' and '.join(missing)} too"
        )
    if config.prediction_type not in {"epsilon", "v_prediction"}:
        raise ValueError(
            f"model.prediction_type = {config.prediction_type!r}; choose one of epsilon, "
            "v_prediction"
        )
    encoder = _part("model.text_encoder", str(config.text_encoder), "text_encoder", config)
    given = config.tokenizer or str(config.text_encoder)
    name = "model.tokenizer" if config.tokenizer else "model.text_encoder"
    tokenizer = _part(name, given, "tokenizer", config)
    if tokenizer.place.is_file():  # an OpenCLIP file lies beside its vocabulary
        tokenizer = replace(tokenizer, place=tokenizer.place.parent)
    if not any((tokenizer.place / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        raise ValueError(
            f"{tokenizer.setting}: {tokenizer.place} has no vocab.json with merges.txt, and no "
            "tokenizer.json; give the folder of the tokenizer as model.tokenizer"
        )
    return Parts(
        autoencoder=_part("model.autoencoder", str(config.autoencoder), "vae", config),
        text_encoder=encoder,
        tokenizer=tokenizer,
        network=blueprint(str(config.network.config)),
        scheduler=SCHEDULER if config.scheduler is None else _scheduler(config.scheduler),
    )


def _scheduler(given: str) -> Mapping[str, Any]:
    """Return the settings of a scheduler's folder, or of a whole pipeline's."""
    path = Path(given).expanduser()
    for file in (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"):
        if file.is_file() and "_class_name" in (settings := read_json(file)):
            return settings
    raise ValueError(
        f"model.scheduler = {given!r} holds no scheduler_config.json that names its class; give a "
        "folder that diffusers saved"
    )


def _part(name: str, given: str, inner: str, config: ModelConfig) -> Part:
    """Find one part: a file, a folder, or the folder of a whole pipeline that has it."""
    setting = f"{name} = {given!r}"
    path = Path(given).expanduser()
    if path.is_file():
        check_suffix(path, setting, allow_pickle=config.allow_pickle)
        return Part(setting, path, inner)
    folder = find_model(
        given, allow_pickle=config.allow_pickle, variant=config.variant, setting=name
    )
    whole = (folder / "model_index.json").is_file()
    return Part(setting, folder / inner if whole else folder, inner)


def _key(parts: Parts, config: ModelConfig) -> str:
    """Return a hash of what the folder is made of; of files, their names, sizes and times."""
    told: dict[str, Any] = {
        "format": FORMAT,
        "network": dict(parts.network),
        "scheduler": dict(parts.scheduler),
        "prediction_type": config.prediction_type,
        "image_size": config.image_size,
        "variant": config.variant,
    }
    for part in (parts.autoencoder, parts.text_encoder, parts.tokenizer):
        stats = [(file.name, file.stat()) for file in part.files()]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        told[part.kind] = [str(part.place.resolve()), files]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


# --- Writing


def _write(parts: Parts, config: ModelConfig, folder: Path) -> None:
    _write_vae(parts.autoencoder, folder / "vae", config)
    is_open_clip = _write_encoder(parts.text_encoder, folder / "text_encoder", config)
    _write_tokenizer(parts.tokenizer, folder / "tokenizer", zero_padded=is_open_clip)
    vae, text = (read_json(folder / name / "config.json") for name in ("vae", "text_encoder"))
    _check_fit(parts, vae, text)
    size = _latent_size(config.image_size, downsampling(vae))
    network = {**parts.network, **({} if size is None else {"sample_size": size})}
    _write_json(folder / "unet" / "config.json", network)
    steps = {**parts.scheduler, "prediction_type": config.prediction_type}
    _write_json(folder / "scheduler" / "scheduler_config.json", steps)
    index = {**INDEX, "scheduler": ["diffusers", steps["_class_name"]]}
    _write_json(folder / "model_index.json", index)


def _latent_size(image_size: int | None, factor: int) -> int | None:
    if image_size is not None and image_size % factor:
        raise ValueError(
            f"model.image_size = {image_size} must be a multiple of {factor} pixels; the nearest "
            f"is {max(factor, round(image_size / factor) * factor)}"
        )
    return None if image_size is None else image_size // factor


def _write_vae(part: Part, folder: Path, config: ModelConfig) -> None:
    if part.place.is_file():
        state = read_tensors(part.place, part.setting, allow_pickle=config.allow_pickle)
        write_autoencoder(state, folder, part.setting)
        return
    kind = _settings(part).get("_class_name")
    if kind != "AutoencoderKL":
        raise ValueError(
            f"{part.setting}: {part.place / 'config.json'} is of {kind or 'no class'}; give an "
            "AutoencoderKL"
        )
    _link(part.files(), folder)


def _write_encoder(part: Part, folder: Path, config: ModelConfig) -> bool:
    """Write a text encoder; return whether it is OpenCLIP's, as Stable Diffusion 2 reads it."""
    from transformers import CLIPConfig

    allow = config.allow_pickle
    if part.place.is_file():
        write_open_clip(
            read_tensors(part.place, part.setting, allow_pickle=allow), folder, part.setting
        )
        return True
    kind = _settings(part).get("model_type")
    if kind == "clip_text_model":
        _link(part.files(), folder)
        return False
    if kind != "clip":
        raise ValueError(
            f"{part.setting}: {part.place / 'config.json'} is of {kind or 'no model'}; give a CLIP"
        )
    files = [part.place / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), files[0])
    state = read_tensors(file, part.setting, allow_pickle=allow)
    text: Any = CLIPConfig.from_pretrained(part.place).text_config
    towers = {key: t for key, t in state.items() if key.startswith("text_model.")}
    is_open_clip = all(vars(text)[name] == value for name, value in VIT_H.items())
    if is_open_clip:
        text.num_hidden_layers -= 1  # Stable Diffusion 2 reads the layer before the last
        last = f"text_model.encoder.layers.{text.num_hidden_layers}."
        towers = {key: t for key, t in towers.items() if not key.startswith(last)}
    write_text_encoder(text, towers, folder)
    return is_open_clip


def _settings(part: Part) -> dict[str, Any]:
    file = part.place / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{part.setting}: {part.place} has no config.json; give a folder that diffusers or "
            "transformers saved, or a file of weights"
        )
    settings = read_json(file)
    return settings if isinstance(settings, dict) else {}


def _check_fit(parts: Parts, vae: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    wanted, given = parts.network.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
    if wanted != given:
        raise ValueError(
            f"{parts.text_encoder.setting} gives states of {given} numbers, and the network of "
            f"model.network.config reads {wanted}: sd1 takes OpenAI's CLIP ViT-L/14 (768), sd2 "
            "OpenCLIP's ViT-H/14 (1024)"
        )
    wanted, given = parts.network.get("in_channels", 4), vae.get("latent_channels", 4)
    if wanted != given:
        raise ValueError(
            f"{parts.autoencoder.setting} gives latents of {given} channels, and the network of "
            f"model.network.config reads {wanted}; give another autoencoder or network"
        )


def _write_tokenizer(part: Part, folder: Path, *, zero_padded: bool) -> None:
    """Write a CLIP's tokenizer.

    Args:
        zero_padded: fill up with token 0, as OpenCLIP and so Stable Diffusion 2 do; OpenAI's CLIP
            fills up with its end token.
    """
    if not zero_padded and (part.place / "tokenizer_config.json").is_file():
        _link(part.files(), folder)
        return
    vocabulary = part.place / "vocab.json"
    if not vocabulary.is_file() or not (part.place / "merges.txt").is_file():
        raise ValueError(
            f"{part.setting}: {part.place} lacks vocab.json or merges.txt, of which OpenCLIP's "
            "tokenizer is made; give a folder with both as model.tokenizer"
        )
    _link([vocabulary, part.place / "merges.txt"], folder)
    tokens = read_json(vocabulary)
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": next(t for t, i in tokens.items() if i == 0) if zero_padded else end,
        "model_max_length": 77,
        "errors": "replace",
        "add_prefix_space": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _link(files: Iterable[Path], folder: Path) -> None:
    """Put files into a folder, sharing their bytes where the file system can."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        whole = file.resolve()  # the hub's cache has links
        try:
            (folder / file.name).hardlink_to(whole)
        except OSError:
            try:
                (folder / file.name).symlink_to(whole)
            except OSError:
                shutil.copy(whole, folder / file.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
