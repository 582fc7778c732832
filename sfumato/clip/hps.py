"""HPSv2 and HPSv2.1: a published file of OpenCLIP's weights, without settings beside it.

Source: hpsv2/img_score.py and hpsv2/src/open_clip/transform.py of tgxs002/HPSv2.
"""

import warnings
from pathlib import Path

import torch

from sfumato.clip.folder import ClipParts, fetch_processor, read_tokenizer
from sfumato.clip.open_clip import is_open_clip, open_clip_model, parse_open_clip, read_open_clip
from sfumato.clip.preprocessing import ImageSettings
from sfumato.clip.tensor_files import read_tensors
from sfumato.clip.tensors import published_file
from sfumato.config import HPS_FILES

# OpenCLIP's ViT-H-14, on which both versions are trained.
VIT_H_14 = {
    "model_cfg": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": 32,
            "width": 1280,
            "head_width": 80,
            "patch_size": 14,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 1024,
            "heads": 16,
            "layers": 24,
        },
    }
}


def load_hps(path_or_hub_id: str, *, version: str, processor: str, preprocessing: str) -> ClipParts:
    """Load HPSv2 as transformers' CLIPModel.

    Inside `torch.device("meta")` no weight is read, and the model has no memory. The network is
    ViT-H-14, unless an open_clip_config.json beside the weights states another.

    Args:
        path_or_hub_id: the published file, its folder or its hub id.
        version: 2.0 or 2.1. Their weights have the same names and shapes, so that only the file's
            name tells them apart. A file of another name is taken as stated, with a warning.
        processor: folder or hub id of the tokenizer.
        preprocessing: letterbox (the published one: the longer side is resized, black fills up the
            square) or crop (the shorter side is resized, the centre cut, as training codes do).

    Raises:
        ValueError: if a file is missing, damaged, of another model, or named as the other version.
    """
    from transformers import CLIPModel, CLIPTextConfig

    path, file = Path(path_or_hub_id).expanduser(), None
    if torch.get_default_device().type != "meta":
        file = published_file(path_or_hub_id, HPS_FILES[version])
    _check_version(file or path, version)
    home = file.parent if file else path if path.is_dir() else path.parent
    if is_open_clip(home):
        stated = read_open_clip(home)
    else:
        stated = parse_open_clip(Path("ViT-H-14"), VIT_H_14)
    text, side = stated.config.text_config, stated.image_settings.crop
    assert isinstance(text, CLIPTextConfig)
    tokenizer = read_tokenizer(fetch_processor(processor), text)
    if file is None:
        model = CLIPModel(stated.config)
    else:
        state = read_tensors(file, "reward.pretrained", allow_pickle=True, strangers=False)
        model = open_clip_model(state, stated.config, f"HPSv2: {file}")
    settings = ImageSettings(side, side, rounds=True, letterbox=preprocessing == "letterbox")
    return ClipParts(model, tokenizer, settings, text.max_position_embeddings, cleans=True)


def _check_version(path: Path, version: str) -> None:
    """Refuse a file that is named, also through links, as the other version; warn if as none."""
    named = {path.stem, path.resolve().stem}
    for other, stem in HPS_FILES.items():
        if stem in named and other != version:
            raise ValueError(
                f"reward.pretrained: {path} is version {other} by its name, and "
                f"reward.version={version}; set reward.version={other}, or give the other file"
            )
    if path.is_file() and not named & {*HPS_FILES.values()}:
        warnings.warn(
            f"reward.pretrained: {path} is taken for version {version}, as reward.version says; "
            f"the name of the published file is {HPS_FILES[version]}",
            stacklevel=2,
        )
