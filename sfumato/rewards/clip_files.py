"""Reader of CLIP models: a transformers folder or a hub id, checked before weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sfumato.files import read_object
from sfumato.hub import fetch
from sfumato.weights import load_whole

if TYPE_CHECKING:
    import transformers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PUBLISHED_STEPS = {
    "do_resize": True,
    "do_center_crop": True,
    "do_normalize": True,
    "resample": 3,  # bicubic
}
_AGAIN = "copy or download it again"
LEGACY_EOS = 2  # transformers takes it as a sign to pool at the highest token


@dataclass(frozen=True)
class ImageSettings:
    """What an image tower expects: short side and crop in pixels, mean and std per channel."""

    size: int
    crop: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class ClipParts:
    """Parts of a CLIP reward; `max_tokens` counts the start and end tokens too."""

    model: "transformers.CLIPModel"
    tokenizer: "transformers.PreTrainedTokenizerBase"
    image_settings: ImageSettings
    max_tokens: int


def load_clip(path_or_hub_id: str, processor: str | None = None) -> ClipParts:
    """Load a CLIPModel with its tokenizer and image settings, weights last and as stored.

    Inside `torch.device("meta")` no weight is read, and the model has no memory.

    Args:
        path_or_hub_id: a folder as transformers saves it, or a hub id, which is looked up in the
            local cache, then on the hub. Weights are read from safetensors only.
        processor: folder or hub id of the tokenizer and preprocessor_config.json; by default
            `path_or_hub_id`.

    Raises:
        ValueError: if a folder or a file is missing, unreadable, or of another kind of model.
    """
    from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig

    config = _read_config(_fetch(path_or_hub_id, _CONFIG))
    text, vision = config.text_config, config.vision_config
    assert isinstance(text, CLIPTextConfig)
    assert isinstance(vision, CLIPVisionConfig)
    if processor is None:
        folder = _fetch(path_or_hub_id, _PROCESSOR)
    else:
        folder = _fetch(processor, _PROCESSOR, "reward.processor")
    tokenizer = _read_tokenizer(folder, text)
    image_size = _pixels(vision.image_size, (), f"image_size of {path_or_hub_id}")
    image_settings = _read_image_settings(folder, image_size)
    if torch.get_default_device().type == "meta":
        model = CLIPModel(config)
    else:
        weights = _fetch(path_or_hub_id, _WEIGHTS)
        model = load_whole(CLIPModel, weights, "CLIPModel", use_safetensors=True)
    return ClipParts(model, tokenizer, image_settings, text.max_position_embeddings)


@dataclass(frozen=True)
class _Files:
    """Files of a model folder: patterns to fetch, and sets of which one must exist."""

    patterns: tuple[str, ...]
    alternatives: tuple[tuple[str, ...], ...]
    advice: str

    def are_in(self, folder: Path) -> bool:
        return any(all((folder / name).is_file() for name in names) for names in self.alternatives)


_CONFIG = _Files(
    ("config.json",),
    (("config.json",),),
    "choose the folder of a CLIPModel as transformers saves it",
)
_PROCESSOR = _Files(
    (
        "config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
    ),
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "save the tokenizer there, or name a folder or hub id that has one as `processor` "
    "(for PickScore laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
)
_WEIGHTS = _Files(
    ("config.json", "model*.safetensors", "model.safetensors.index.json"),
    (("model.safetensors",), ("model.safetensors.index.json",)),
    "pickled weights are not read; convert them once by loading them with transformers and "
    "calling save_pretrained",
)


def _fetch(name: str, files: _Files, setting: str = "reward.pretrained") -> Path:
    """Return the folder `name`, or the snapshot of the hub id `name`, that has `files`."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = fetch(name, setting, files.patterns, complete=files.are_in)
    if not files.are_in(folder):
        sets = " or ".join(" with ".join(names) for names in files.alternatives)
        raise ValueError(f"{name} has no {sets}; {files.advice}")
    return folder


def _read_config(folder: Path) -> "transformers.CLIPConfig":
    from transformers import CLIPConfig

    model_type = read_object(folder / "config.json", _AGAIN).get("model_type")
    if model_type != "clip":
        raise ValueError(
            f"{folder} holds a model of model_type {model_type!r}, not 'clip'; choose a whole "
            "CLIPModel, with image and text towers"
        )
    return CLIPConfig.from_pretrained(folder, local_files_only=True)


def _read_tokenizer(
    folder: Path, text: "transformers.CLIPTextConfig"
) -> "transformers.PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        if (folder / name).is_file():
            read_object(folder / name, _AGAIN)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the text tower knows "
            f"{text.vocab_size}; name the model's own tokenizer as `processor`"
        )
    # transformers pools the text at the end token; where it finds none it silently takes the
    # start token, and every prompt scores alike.
    if text.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
        raise ValueError(
            f"the tokenizer in {folder} ends prompts with token {tokenizer.eos_token_id}, but the "
            f"text tower's eos_token_id is {text.eos_token_id}, so that the score would ignore the "
            "prompt; correct text_config in the model's config.json or name its own tokenizer"
        )
    return tokenizer


def _read_image_settings(folder: Path, image_size: int) -> ImageSettings:
    """Read the settings, with CLIP's published ones where none are stated."""
    path = folder / "preprocessor_config.json"
    raw = read_object(path, _AGAIN) if path.is_file() else {}
    if not raw and (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        raw = read_object(path, _AGAIN).get("image_processor", {})
    for key, value in PUBLISHED_STEPS.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{path} states {key} = {raw[key]}, but CLIP's preprocessing has {value}; choose a "
                "model trained with CLIP's preprocessing, or name its `processor`"
            )
    settings = ImageSettings(
        size=_pixels(raw.get("size", image_size), ("shortest_edge",), f"size in {path}"),
        crop=_pixels(raw.get("crop_size", image_size), ("height", "width"), f"crop_size in {path}"),
        mean=tuple(raw.get("image_mean", CLIP_MEAN)),
        std=tuple(raw.get("image_std", CLIP_STD)),
    )
    if settings.crop != image_size or settings.size < settings.crop:
        raise ValueError(
            f"{path} resizes to {settings.size} px and crops {settings.crop} px, but the image "
            f"tower takes {image_size} px; name the model's own `processor`"
        )
    return settings


def _pixels(value: object, keys: tuple[str, ...], what: str) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, dict) and set(value) == set(keys) and len(set(value.values())) == 1:
        return int(value[keys[0]])
    raise ValueError(
        f"{what} is {value}; state one whole number of pixels, as published CLIP models do"
    )
