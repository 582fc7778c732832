"""Door of CLIP's published files, and of rewards made of it: layouts and preprocessing.

Other rooms import from this package only, never from its modules.
"""

from sfumato.clip.cleaning import clean
from sfumato.clip.folder import (
    ClipParts,
    load_clip,
    model_folder,
    open_tokenizer,
    processor_folder,
)
from sfumato.clip.hps import load_hps
from sfumato.clip.image_reward import ImageRewardParts, load_image_reward
from sfumato.clip.open_clip import CONFIG as OPEN_CLIP_CONFIG
from sfumato.clip.open_clip import WEIGHTS as OPEN_CLIP
from sfumato.clip.open_clip import (
    OpenClip,
    fetch_open_clip,
    is_open_clip,
    read_open_clip,
    renamed,
)
from sfumato.clip.preprocessing import (
    ImageSettings,
    first_sentence,
    preprocess,
    read_processor,
    save_processor,
)
from sfumato.clip.tensor_files import check_suffix, read_files, read_tensors
from sfumato.clip.tensors import published_file, weight_files
from sfumato.clip.vision import VisionNetwork, load_vision

__all__ = [
    "OPEN_CLIP",
    "OPEN_CLIP_CONFIG",
    "ClipParts",
    "ImageRewardParts",
    "ImageSettings",
    "OpenClip",
    "VisionNetwork",
    "check_suffix",
    "clean",
    "fetch_open_clip",
    "first_sentence",
    "is_open_clip",
    "load_clip",
    "load_hps",
    "load_image_reward",
    "load_vision",
    "model_folder",
    "open_tokenizer",
    "preprocess",
    "processor_folder",
    "published_file",
    "read_files",
    "read_open_clip",
    "read_processor",
    "read_tensors",
    "renamed",
    "save_processor",
    "weight_files",
]
