"""A network's weights in the names of Stable Diffusion's original code, for its other readers."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.models.formats import read_json, read_model_index
from sfumato.models.original import PREFIX, original_names
from sfumato.models.tensor_files import read_tensors

FILE = "unet.safetensors"
PIPELINES = ("StableDiffusionPipeline",)  # Stable Diffusion 1 and 2


def write_original(pipeline: Path, folder: Path) -> bool:
    """Write the U-Net of a diffusers folder as folder/unet.safetensors, in LDM's names.

    Returns:
        Whether the original code has such a network; nothing is written otherwise.
    """
    index = pipeline / "model_index.json"
    if not index.is_file() or read_model_index(pipeline)["_class_name"] not in PIPELINES:
        return False
    weights = _read_unet(pipeline)
    try:
        names = original_names(weights)
    except ValueError:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{names[key]}": tensor for key, tensor in weights.items()}
    save_file(named, folder / FILE, metadata={"format": "pt"})
    return True


def unlike_original(pipeline: Path, folder: Path) -> list[str]:
    """Return the weights that diffusers, reading what `write_original` wrote, has otherwise."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with safe_open(folder / FILE, "pt") as tensors:
        state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    settings = read_json(pipeline / "unet" / "config.json")
    theirs = convert_ldm_unet_checkpoint(state, settings)
    ours = _read_unet(pipeline)
    same = {key for key in ours.keys() & theirs.keys() if torch.equal(ours[key], theirs[key])}
    return sorted((ours.keys() | theirs.keys()) - same)


def _read_unet(pipeline: Path) -> dict[str, Tensor]:
    files = sorted((pipeline / "unet").glob("*.safetensors"))
    parts = [read_tensors(file, str(file), allow_pickle=False) for file in files]
    return {key: tensor for part in parts for key, tensor in part.items()}
