"""The tiny pipeline of every family, and a folder of images with captions to train on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tiny_flux import write_tiny_flux
from tiny_qwen_image import write_tiny_qwen_image
from tiny_sd import write_tiny_sd
from tiny_sd3 import write_tiny_sd3
from tiny_sdxl import write_tiny_sdxl

from sfumato.images import save_image

PIXELS = 32
COLORS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.2, 1.0)}

WRITERS: dict[str, Callable[[Path], None]] = {
    "stable_diffusion": write_tiny_sd,
    "stable_diffusion_xl": write_tiny_sdxl,
    "stable_diffusion_3": partial(write_tiny_sd3, medium=True),
    "flux": write_tiny_flux,
    "qwen_image": write_tiny_qwen_image,
}


def write_pictures(folder: Path, count: int = 6, pixels: int = PIXELS) -> Path:
    """Write plain pictures of three colors, each with its caption beside it."""
    folder.mkdir(parents=True)
    noise = torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    for i in range(count):
        name = list(COLORS)[i % 3]
        plain = torch.tensor(COLORS[name])[:, None, None].expand(3, pixels, pixels)
        save_image(0.9 * plain + 0.1 * noise[i], folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {name} picture\n")
    return folder
