"""Reader of CLIP models: a folder or a hub id, checked before weights are read."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.clip.open_clip import CONFIG as OPEN_CLIP_CONFIG
from sfumato.clip.open_clip import WEIGHTS as OPEN_CLIP_WEIGHTS
from sfumato.clip.open_clip import is_open_clip, load_open_clip, read_open_clip
from sfumato.clip.preprocessing import WHOLE, ImageSettings, processor_settings
from sfumato.files import read_object
from sfumato.hub import fetch
from sfumato.weights import load_whole

if TYPE_CHECKING:
    import transformers

_AGAIN = "copy or download it again"
LEGACY_EOS = 2  # transformers takes it as a sign to pool at the highest token


@dataclass(frozen=True)
class ClipParts:
    """Parts of a CLIP reward.

    Attributes:
        max_tokens: of a prompt, those of start and end included.
        cleans: whether prompts are cleaned as OpenCLIP's tokenizer does; transformers' does not.
    """

    model: "transformers.CLIPModel"
    tokenizer: "transformers.PreTrainedTokenizerBase"
    image_settings: ImageSettings
    max_tokens: int
    cleans: bool = False


def load_clip(path_or_hub_id: str, processor: str | None = None) -> ClipParts:
    """Load a CLIPModel with its tokenizer and image settings, weights last and as stored.

    Inside `torch.device("meta")` no weight is read, and the model has no memory.

    Args:
        path_or_hub_id: a folder as transformers or OpenCLIP saves it, or a hub id, which is looked
            up in the local cache, then on the hub. Weights are read from safetensors only.
        processor: folder or hub id of the tokenizer and preprocessor_config.json; by default
            `path_or_hub_id`.

    Raises:
        ValueError: if a folder or a file is missing, unreadable, or of another kind of model.
    """
    from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder = _fetch(path_or_hub_id, _CONFIG)
    whole = _is_transformers(folder, is_local=Path(path_or_hub_id).expanduser().is_dir())
    stated = None if whole else read_open_clip(folder)
    config = _read_config(folder) if stated is None else stated.config
    text, vision = config.text_config, config.vision_config
    assert isinstance(text, CLIPTextConfig)
    assert isinstance(vision, CLIPVisionConfig)
    folder = _fetch(path_or_hub_id, _PROCESSOR) if processor is None else fetch_processor(processor)
    tokenizer = read_tokenizer(folder, text)
    side = vision.image_size
    if not isinstance(side, int):
        raise ValueError(f"image_size of {path_or_hub_id} is {side}; {WHOLE}")
    if stated is None or processor is not None:
        image_settings = _read_image_settings(folder, side)
    else:
        image_settings = stated.image_settings
    if torch.get_default_device().type == "meta":
        model = CLIPModel(config)
    elif stated is not None:
        model = load_open_clip(_fetch(path_or_hub_id, _OPEN_CLIP), config)
    else:
        place = _fetch(path_or_hub_id, _WEIGHTS)
        model = load_whole(CLIPModel, place, "CLIPModel", use_safetensors=True)
    cleans = stated is not None
    return ClipParts(model, tokenizer, image_settings, text.max_position_embeddings, cleans)


def model_folder(path_or_hub_id: str, model_types: Collection[str] = ()) -> Path:
    """Return the folder of a model of transformers that is no CLIPModel.

    Inside `torch.device("meta")` the weights need not be there.

    Args:
        path_or_hub_id: as in `load_clip`.
        model_types: that its config.json may state; all where none are named.

    Raises:
        ValueError: if a file is missing, or the model is of another kind.
    """
    folder = _fetch(path_or_hub_id, _STATED)
    stated = read_object(folder / "config.json", _AGAIN).get("model_type")
    if model_types and stated not in model_types:
        raise ValueError(
            f"reward.pretrained = {path_or_hub_id!r} holds a model of model_type {stated!r}, not "
            f"{' or '.join(map(repr, model_types))}; choose a folder that has one"
        )
    is_meta = torch.get_default_device().type == "meta"
    return folder if is_meta else _fetch(path_or_hub_id, _WEIGHTS)


def processor_folder(path_or_hub_id: str) -> Path:
    """Return the folder of an image processor; raises as `model_folder`."""
    return _fetch(path_or_hub_id, _IMAGE_PROCESSOR, "reward.processor")


def _is_transformers(folder: Path, *, is_local: bool) -> bool:
    """Say in which of two layouts a model is read: transformers', if the folder has it whole.

    Args:
        is_local: False for a hub's snapshot, whose weights may not be downloaded yet.
    """
    if not is_open_clip(folder):
        return True
    config = folder / "config.json"
    is_clip = config.is_file() and read_object(config, _AGAIN).get("model_type") == "clip"
    return is_clip and (_WEIGHTS.are_in(folder) or not is_local)


@dataclass(frozen=True)
class _Files:
    """Files of a model folder: patterns to fetch, and sets of which one must exist."""

    patterns: tuple[str, ...]
    alternatives: tuple[tuple[str, ...], ...]
    advice: str

    def are_in(self, folder: Path) -> bool:
        return any(all((folder / name).is_file() for name in names) for names in self.alternatives)


_CONFIG = _Files(
    ("config.json", OPEN_CLIP_CONFIG),
    (("config.json",), (OPEN_CLIP_CONFIG,)),
    "choose the folder of a CLIPModel as transformers saves it",
)
_STATED = _Files(
    ("config.json",),
    (("config.json",),),
    "choose the folder of a model as transformers saves it",
)
_IMAGE_PROCESSOR = _Files(
    ("config.json", "preprocessor_config.json"),
    (("preprocessor_config.json",),),
    "save the model's image processor there, or name a folder or hub id that has one as "
    "`processor`",
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
        OPEN_CLIP_CONFIG,
    ),
    (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "save the tokenizer there, or name a folder or hub id that has one as `processor` "
    "(for PickScore and HPSv2 laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
)
_WEIGHTS = _Files(
    ("config.json", "model*.safetensors", "model.safetensors.index.json"),
    (("model.safetensors",), ("model.safetensors.index.json",)),
    "pickled weights are not read; convert them once by loading them with transformers and "
    "calling save_pretrained",
)
_OPEN_CLIP = _Files(
    (OPEN_CLIP_CONFIG, "open_clip*.safetensors", "open_clip*.safetensors.index.json"),
    tuple((f"{name}{end}",) for name in OPEN_CLIP_WEIGHTS for end in ("", ".index.json")),
    "pickled weights are not read; load them once with torch.load(FILE, weights_only=True), and "
    "save them with safetensors.torch.save_file",
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


def fetch_processor(name: str) -> Path:
    """Return the folder of a tokenizer of CLIP's, downloaded if need be.

    Raises:
        ValueError: it has no such files.
    """
    return _fetch(name, _PROCESSOR, "reward.processor")


def _read_config(folder: Path) -> "transformers.CLIPConfig":
    from transformers import CLIPConfig

    model_type = read_object(folder / "config.json", _AGAIN).get("model_type")
    if model_type != "clip":
        raise ValueError(
            f"{folder} holds a model of model_type {model_type!r}, not 'clip'; choose a whole "
            "CLIPModel, with image and text towers"
        )
    return CLIPConfig.from_pretrained(folder, local_files_only=True)


def open_tokenizer(folder: Path, kind: Any) -> "transformers.PreTrainedTokenizerBase":
    """Open the tokenizer in a folder.

    Args:
        kind: its class in transformers, if no tokenizer_config.json names it.

    Raises:
        ValueError: it cannot be read.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        if (folder / name).is_file():
            read_object(folder / name, _AGAIN)
    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else kind
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the tokenizer in {folder} could not be read ({reason}); save it with transformers "
            "again, or name another folder as `processor`"
        ) from error


def read_tokenizer(
    folder: Path, text: "transformers.CLIPTextConfig"
) -> "transformers.PreTrainedTokenizerBase":
    """Open the tokenizer of a text tower of CLIP's.

    Raises:
        ValueError: it cannot be read, or its tokens are not those of the tower.
    """
    from transformers import CLIPTokenizer

    tokenizer = open_tokenizer(folder, CLIPTokenizer)
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
        raw = read_object(path, _AGAIN).get("image_processor") or {}
        if not isinstance(raw, dict):
            raise ValueError(f"{path} states image_processor = {raw!r}, no settings; {_AGAIN}")
    if not raw and is_open_clip(folder):
        return read_open_clip(folder).image_settings
    return processor_settings(path, raw, image_size)
