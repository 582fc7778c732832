"""Tensors to image files and back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Return an 8-bit picture of a tensor in [0, 1]."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(image: Float[Tensor, "3 H W"], file: Path) -> None:
    """Write a tensor in [0, 1] as the format of the file's suffix."""
    to_pil(image).save(file)


def load_images(files: Sequence[Path]) -> Float[Tensor, "b 3 H W"]:
    """Read pictures of one size, which Sfumato wrote, into [0, 1]."""
    arrays = [np.array(_open(file), dtype=np.float32) / 255 for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _open(file: Path) -> Image.Image:
    # Pillow reads many formats, some of them by starting other programs.
    with Image.open(file, formats=("PNG", "JPEG")) as picture:
        return picture.convert("RGB")
