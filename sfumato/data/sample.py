"""Training examples: pictures, resized to cover a size, cropped, perhaps mirrored; or encodings.

scale = max(H / h, W / w),   resized = scale (h, w),   crop = (top, left, H, W) of resized
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor

from sfumato.data.decode import Bounds, RefusedImageError, read_rgb
from sfumato.data.entries import Entry
from sfumato.data.stream import BrokenRowError
from sfumato.diffusion.randomness import derive

_SHOWN = 80  # characters of a caption in messages

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Encoded:
    """What autoencoder and text encoders made of a picture and its caption.

    Attributes:
        moments: of the latents' posterior, in the dtype of the cache.
        text: states of the caption by the family's names, each with a leading axis of 1.
        empty: states of the empty prompt, with the same names and axes.
        size: height and width of the picture that was encoded, in pixels.
    """

    moments: Shaped[Tensor, "m h w"]
    text: Mapping[str, Shaped[Tensor, "1 ..."]]
    empty: Mapping[str, Shaped[Tensor, "1 ..."]]
    size: Size


@dataclass(frozen=True)
class Sample:
    """One training example: either pixels or encodings.

    Attributes:
        image: in [-1, 1], float32; None where the picture was encoded beforehand.
        caption: what it shows; never blank.
        original: height and width of the file's picture, upright, before resizing.
        crop: top and left of the crop inside the resized picture, mirrored if the image is.
        name: where it came from, for messages.
        encoded: in place of an image.
    """

    image: Float[Tensor, "3 H W"] | None
    caption: str
    original: Size
    crop: tuple[int, int]
    name: str
    encoded: Encoded | None = None

    @property
    def pixels(self) -> Float[Tensor, "3 H W"]:
        """The image of a sample that was not encoded beforehand."""
        assert self.image is not None, f"{self} was encoded beforehand"
        return self.image

    @property
    def size(self) -> Size:
        """Height and width of the image, in pixels."""
        if self.encoded is not None:
            return self.encoded.size
        return self.pixels.shape[1], self.pixels.shape[2]

    def __str__(self) -> str:
        cut = self.caption if len(self.caption) <= _SHOWN else f"{self.caption[: _SHOWN - 1]}…"
        return f"{self.name} ({cut})"


@dataclass(frozen=True)
class Preference:
    """Two samples of one size and caption, and the probability that the first is preferred."""

    first: Sample
    second: Sample
    label: float

    def __str__(self) -> str:
        return str(self.first)


@dataclass(frozen=True)
class Placement:
    """Where the crop lies, as fractions of what may be cut off at top and left; and the mirror."""

    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False


@dataclass(frozen=True)
class Choices:
    """How samples are made: to which sizes, what is left to chance, which pictures are refused.

    Attributes:
        sizes: of images in pixels, by the index that picks name.
    """

    sizes: tuple[Size, ...]
    random_crop: bool = False
    flip: bool = False
    random_caption: bool = False
    bounds: Bounds = field(default_factory=Bounds)

    def caption(self, captions: Sequence[str], seed: int) -> int:
        """Return the index of the caption that a row takes."""
        if not self.random_caption or len(captions) == 1:
            return 0
        return int(random.Random(derive(seed, "caption")).random() * len(captions))

    def placement(self, seed: int) -> Placement:
        """Draw crop and mirror of a row; what is not left to chance is centred and unmirrored."""
        # Of random.Random's methods, only random() is promised to be the same in every Python.
        rng = random.Random(seed)
        top, left, mirror = rng.random(), rng.random(), rng.random()
        if not self.random_crop:
            top = left = 0.5
        return Placement(top, left, self.flip and mirror < 0.5)

    def sample(self, entry: Entry, bucket: int, seed: int) -> Sample:
        """Decode, resize and crop one picture, drawing caption, crop and mirror.

        Raises:
            BrokenRowError: the picture cannot be used.
        """
        try:
            picture = read_rgb(entry.blob, self.bounds)
        except RefusedImageError as error:
            raise BrokenRowError(entry, str(error)) from None
        array, crop = resize_and_crop(picture, self.sizes[bucket], self.placement(seed))
        caption, original = self.caption(entry.captions, seed), (picture.height, picture.width)
        return Sample(to_tensor(array), entry.captions[caption], original, crop, entry.name)


def covering(original: Size, target: Size) -> Size:
    """Return the smallest size of nearly the original's shape that covers the target."""
    (height, width), (goal_height, goal_width) = original, target
    scale = max(goal_height / height, goal_width / width)
    return max(goal_height, round(height * scale)), max(goal_width, round(width * scale))


def central_crop(original: Size, size: Size) -> tuple[int, int]:
    """Return top and left of the crop that is taken without chance, mirrored or not."""
    resized, centre = covering(original, size), Placement()
    return _offset(centre.top, resized[0] - size[0]), _offset(centre.left, resized[1] - size[1])


def resize_and_crop(
    picture: Image.Image, target: Size, placement: Placement
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize and crop an RGB picture with Lanczos' antialiased filter.

    Resizing and cropping are one operation: an extremely long picture is never resized whole.

    Returns:
        The 8-bit array of shape (H, W, 3), and top and left of the crop.
    """
    height, width = target
    resized_height, resized_width = covering((picture.height, picture.width), target)
    top = _offset(placement.top, resized_height - height)
    left = _offset(placement.left, resized_width - width)
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


def _offset(fraction: float, spare: int) -> int:
    # floor(x (n + 1)) is uniform over 0..n for a uniform x < 1, and n // 2 for 0.5 and an even n.
    return int(fraction * (spare + 1))
