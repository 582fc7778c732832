"""Decoder of pictures: a file's size and format are checked before its pixels are allocated."""

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from sfumato.data.colours import conversion
from sfumato.data.entries import Blob

# Pillow reads many more formats, some of them by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif", ".jpe", ".pjpeg", ".apng")
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
# Pillow's bound of 1 MB is below what other programs write: workflows, histories, large profiles.
NOTES = 64 * 2**20  # bytes of a PNG's notes and profile
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = NOTES
# The factor by which Pillow scales the pixels of a raw mode, but not their colour key.
_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
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
    return read_header(blob, bounds)[0]


def read_header(blob: Blob, bounds: Bounds) -> tuple[tuple[int, int], str]:
    """Return what `read_size` does, and a remark if the picture's colours will be converted.

    Raises:
        RefusedImageError: as `read_size`.
    """
    with _opened(blob, bounds) as picture:
        width, height = picture.size
        turned = _orientation(picture) in _ON_ITS_SIDE
        return (width, height) if turned else (height, width), conversion(picture)[1]


def read_rgb(blob: Blob, bounds: Bounds) -> Image.Image:
    """Return a picture in 8-bit RGB, upright.

    EXIF's orientation is applied. Colours are converted to sRGB by ICC profile, or by a PNG's
    gamma and primaries; CMYK without a profile goes through Pillow's own conversion. Transparent
    parts (alpha channel, palette or colour key) are composited over white. Grey of 16 bits is
    scaled to 8. Of an animation, the first picture is taken.

    Raises:
        RefusedImageError: it is missing, no picture, outside the bounds, wholly transparent, or
            its pixels are damaged.
    """
    with _opened(blob, bounds) as picture, _turn(picture):
        _scale_key(picture)
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
        if "MAX_TEXT" in str(error):
            reason = f"notes or profile of a PNG above {NOTES // 2**20} MB"
            raise RefusedImageError(reason) from None
        raise RefusedImageError("truncated or damaged image") from None


def _orientation(picture: Image.Image) -> int:
    try:
        # Image's own method: that of PNG files would decode the pixels to look after them.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1


def _scale_key(picture: Image.Image) -> None:
    """Scale the colour key of a PNG as Pillow will scale its pixels."""
    tile = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    scale, key = (
        _KEY_SCALES.get(str(tile[0][3])) if tile else None,
        picture.info.get("transparency"),
    )
    if scale is not None and key is not None:
        scaled = tuple(int(each * scale) for each in (key if isinstance(key, tuple) else [key]))
        picture.info["transparency"] = scaled if isinstance(key, tuple) else scaled[0]


def _turn(picture: Image.Image) -> AbstractContextManager[Any]:
    """Let large pictures wait for each other."""
    return _ONE_LARGE if picture.width * picture.height > _LARGE else nullcontext()


def _by_strips(picture: Image.Image) -> Image.Image:
    """Convert strip by strip: what a conversion holds meanwhile is small."""
    convert, _ = conversion(picture)
    rows = max(1, _LARGE // picture.width)
    tops = range(0, picture.height, rows)
    whole = Image.new("RGB", picture.size) if len(tops) > 1 else None
    rgb, seen = picture, False
    for top in tops:
        box = (0, top, picture.width, min(top + rows, picture.height))
        rgb, opacity = _to_rgb(picture if whole is None else picture.crop(box), convert)
        seen = seen or opacity > 0
        if whole is not None:
            whole.paste(rgb, box)
    if not seen:
        raise RefusedImageError("wholly transparent picture")
    return rgb if whole is None else whole


def _to_rgb(
    picture: Image.Image, convert: Callable[[Image.Image], Image.Image] | None
) -> tuple[Image.Image, int]:
    """Return a picture in RGB, and its highest opacity, of 255."""
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if picture.mode not in {"RGBA", "LA", "PA"} and "transparency" not in picture.info:
        if convert is not None:
            return convert(picture), 255
        return picture if picture.mode == "RGB" else picture.convert("RGB"), 255
    rgba = picture.convert("RGBA")
    alpha = rgba.getchannel("A")
    if convert is not None:
        rgba = convert(rgba.convert("RGB"))
        rgba.putalpha(alpha)
    on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return on_white.convert("RGB"), int(alpha.getextrema()[1])  # type: ignore[arg-type]


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Return grey of 16 bits as grey of 8, with alpha if one value is transparent."""
    raw, key = np.asarray(picture), picture.info.get("transparency")
    scaled = ((raw.astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8)
    if key is None:
        return Image.fromarray(scaled)
    alpha = np.where(raw == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(scaled), Image.fromarray(alpha)))
