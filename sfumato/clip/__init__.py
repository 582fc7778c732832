"""Door of CLIP's published files: transformers' and OpenCLIP's layouts, and their preprocessing.

Other rooms import from this package only, never from its modules.
"""

from sfumato.clip.folder import ClipParts, load_clip
from sfumato.clip.open_clip import CONFIG as OPEN_CLIP_CONFIG
from sfumato.clip.open_clip import WEIGHTS as OPEN_CLIP
from sfumato.clip.open_clip import (
    OpenClip,
    fetch_open_clip,
    is_open_clip,
    read_open_clip,
    renamed,
)
from sfumato.clip.preprocessing import ImageSettings, preprocess, save_processor
from sfumato.clip.tensors import weight_files

__all__ = [
    "OPEN_CLIP",
    "OPEN_CLIP_CONFIG",
    "ClipParts",
    "ImageSettings",
    "OpenClip",
    "fetch_open_clip",
    "is_open_clip",
    "load_clip",
    "preprocess",
    "read_open_clip",
    "renamed",
    "save_processor",
    "weight_files",
]
