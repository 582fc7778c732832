"""Decoder of pictures: a file's size and format are checked before its pixels are allocated."""

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from sfumato.data.entries import Blob

# Pillow reads many more formats, some of them by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LARGEST = 178_956_970  # pixels: above it Pillow itself refuses a decompression bomb

_LARGE = 2**24  # pixels: pictures above it are decoded one at a time, for the sake of memory
_ONE_LARGE = threading.Lock()
_LARGEST_FILE = 2**31  # bytes, more than any picture of LARGEST pixels has

# What Pillow raises on damaged files; its decoders trust their input in many places.
_DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})


@dataclass(frozen=True)
class Bounds:
    """Bounds of a picture: `smallest` pixels at the shorter side, `pixels` at most in all."""

    smallest: int = 1
    pixels: int = LARGEST


class RefusedImageError(Exception):
    """A picture that cannot be used; the message is the reason, the same for all of its kind."""


def read_size(blob: Blob, bounds: Bounds) -> tuple[int, int]:
    """Return height and width of a picture when upright, reading only its header.

    Raises:
        RefusedImageError: it is missing, no picture, or outside the bounds.
    """
    with _opened(blob, bounds) as picture:
        width, height = picture.size
        return (width, height) if _orientation(picture) in _ON_ITS_SIDE else (height, width)


def read_rgb(blob: Blob, bounds: Bounds) -> Image.Image:
    """Return a picture in 8-bit RGB, upright.

    EXIF's orientation is applied. Transparent parts (alpha channel, palette or colour key) are
    composited over white. CMYK goes through Pillow's own conversion; colour profiles are not
    applied. Grey of 16 bits is scaled to 8. Of an animation, the first picture is taken.

    Raises:
        RefusedImageError: it is missing, no picture, outside the bounds, or its pixels are damaged.
    """
    with _opened(blob, bounds) as picture, _turn(picture):
        picture.load()
        # Pillow finds the EXIF of some PNGs only after their pixels.
        orientation = _orientation(picture)
        rgb = _by_strips(picture)
    del picture  # else its pixels would stay beside the copies
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


@contextmanager
def _opened(blob: Blob, bounds: Bounds) -> Iterator[Image.Image]:
    """Open a picture inside the bounds; turn every damage met inside into a refusal."""
    too_large = RefusedImageError(f"more than max_pixels={bounds.pixels} pixels")
    try:
        with blob.open() as file:
            if not file.read(1):
                raise RefusedImageError("zero-byte file")
            file.seek(0, os.SEEK_END)
            if file.tell() > _LARGEST_FILE:
                raise RefusedImageError("file above 2 GiB")
            file.seek(0)
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > bounds.pixels:
                    raise too_large
                if min(picture.size) < bounds.smallest:
                    raise RefusedImageError(f"shorter side below min_size={bounds.smallest}")
                yield picture
    except FileNotFoundError:
        raise RefusedImageError("missing file") from None
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        raise RefusedImageError(f"not an image ({', '.join(FORMATS)})") from None
    except _DAMAGE as error:
        # Pillow's own errors have no number; those of the file system do.
        if isinstance(error, OSError) and error.errno is not None:
            raise RefusedImageError("unreadable file") from None
        raise RefusedImageError("truncated or damaged image") from None


def _orientation(picture: Image.Image) -> int:
    try:
        # Image's own method: that of PNG files would decode the pixels to look after them.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1


def _turn(picture: Image.Image) -> AbstractContextManager[Any]:
    """Let large pictures wait for each other."""
    return _ONE_LARGE if picture.width * picture.height > _LARGE else nullcontext()


def _by_strips(picture: Image.Image) -> Image.Image:
    """Convert strip by strip: what a conversion holds meanwhile is small."""
    rows = max(1, _LARGE // picture.width)
    if rows >= picture.height:
        return _to_rgb(picture)
    whole = Image.new("RGB", picture.size)
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        whole.paste(_to_rgb(picture.crop(box)), box)
    return whole


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")
