"""Tensors to image files and back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sfumato.files import new_file

NOTE = "sfumato"  # the key of a PNG's text


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Return an 8-bit picture of a tensor in [0, 1]."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(image: Float[Tensor, "3 H W"], file: Path) -> None:
    """Write a tensor in [0, 1] as the format of the file's suffix."""
    to_pil(image).save(file)


def write_png(image: Float[Tensor, "3 H W"], file: Path, note: Mapping[str, Any]) -> None:
    """Write a tensor in [0, 1] as a PNG whose text holds a note as JSON.

    Raises:
        ValueError: the file cannot be written; nothing is left of it.
    """
    text = PngInfo()
    text.add_itxt(NOTE, json.dumps(note, ensure_ascii=False))
    with new_file(file) as beside:
        to_pil(image).save(beside, "PNG", pnginfo=text)


def load_images(files: Sequence[Path]) -> Float[Tensor, "b 3 H W"]:
    """Read pictures of one size, which Sfumato wrote, into [0, 1]."""
    arrays = [np.array(_open(file), dtype=np.float32) / 255 for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _open(file: Path) -> Image.Image:
    # Pillow reads many formats, some of them by starting other programs.
    with Image.open(file, formats=("PNG", "JPEG")) as picture:
        return picture.convert("RGB")
