"""A picture made a training example: resized to cover its size, cropped, perhaps mirrored.

scale = max(H / h, W / w),   resized = scale (h, w),   crop = (top, left, H, W) of resized
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

_SHOWN = 80  # characters of a caption in messages

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Sample:
    """One training example.

    Attributes:
        image: in [-1, 1], float32.
        caption: what it shows; never blank.
        original: height and width of the file's picture, upright, before resizing.
        crop: top and left of the crop inside the resized picture, mirrored if the image is.
        name: where it came from, for messages.
    """

    image: Float[Tensor, "3 H W"]
    caption: str
    original: tuple[int, int]
    crop: tuple[int, int]
    name: str

    @property
    def size(self) -> Size:
        """Height and width of the image, in pixels."""
        return self.image.shape[1], self.image.shape[2]

    def __str__(self) -> str:
        cut = self.caption if len(self.caption) <= _SHOWN else f"{self.caption[: _SHOWN - 1]}…"
        return f"{self.name} ({cut})"


@dataclass(frozen=True)
class Placement:
    """Where the crop lies, as fractions of what may be cut off at top and left; and the mirror."""

    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False

    @staticmethod
    def drawn(seed: int, *, random_crop: bool, flip: bool) -> "Placement":
        """Draw what is left to chance; the rest is centred and unmirrored."""
        # Of random.Random's methods, only random() is promised to be the same in every Python.
        rng = random.Random(seed)
        top, left, mirror = rng.random(), rng.random(), rng.random()
        if not random_crop:
            top = left = 0.5
        return Placement(top, left, flip and mirror < 0.5)


def covering(original: Size, target: Size) -> Size:
    """Return the smallest size of nearly the original's shape that covers the target."""
    (height, width), (goal_height, goal_width) = original, target
    scale = max(goal_height / height, goal_width / width)
    return max(goal_height, round(height * scale)), max(goal_width, round(width * scale))


def frame(picture: Image.Image, target: Size, placement: Placement) -> tuple[np.ndarray, Size]:
    """Resize and crop an RGB picture with Lanczos' antialiased filter.

    Resizing and cropping are one operation: an extremely long picture is never resized whole.

    Returns:
        The 8-bit array of shape (H, W, 3), and top and left of the crop.
    """
    (height, width), (resized_height, resized_width) = (
        target,
        covering((picture.height, picture.width), target),
    )
    # floor(x (n + 1)) is uniform over 0..n for a uniform x < 1, and n // 2 for 0.5 and an even n.
    top = int(placement.top * (resized_height - height + 1))
    left = int(placement.left * (resized_width - width + 1))
    from_left = resized_width - width - left if placement.mirrored else left
    x, y = picture.width / resized_width, picture.height / resized_height
    box = (from_left * x, top * y, (from_left + width) * x, (top + height) * y)
    inside = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    cropped = picture.resize((width, height), Image.Resampling.LANCZOS, inside)
    array = np.array(cropped)
    return (array[:, ::-1] if placement.mirrored else array), (top, left)


def to_tensor(array: np.ndarray) -> Float[Tensor, "3 H W"]:
    """Return an 8-bit array of shape (H, W, 3) as float32 in [-1, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    return planes.to(torch.float32).div_(127.5).sub_(1.0)
