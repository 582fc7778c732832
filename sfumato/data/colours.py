"""Colours of pictures, converted to sRGB by littlecms.

A picture says what its numbers mean by an ICC profile, or, in a PNG, by gamma and primaries
(chunks gAMA and cHRM of https://www.w3.org/TR/png-3/). A picture that says nothing is sRGB.
"""

import io
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

ICC, GAMMA = "colours converted to sRGB (ICC profile)", "colours converted to sRGB (PNG gamma)"
_LARGEST = 8 * 2**20  # bytes of a profile; those of printers have 3 MB
_SAME = 2  # of 255: a profile that moves no colour further is sRGB's
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_INTENTS = (ImageCms.Intent.PERCEPTUAL, ImageCms.Intent.RELATIVE_COLORIMETRIC)
_GAMMA = 1 / 2.2  # of the file of an sRGB picture
_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
# What Pillow raises on damaged profiles.
_DAMAGE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)

Convert = Callable[[Image.Image], Image.Image]


def conversion(picture: Image.Image) -> tuple[Convert | None, str]:
    """Return what converts a picture's colours to sRGB, and a remark; None where they are sRGB.

    Only the header is looked at. The conversion takes a picture without transparency, in any
    mode of 8 bits, and returns RGB. A profile that is damaged, or that is one of other channels
    than the picture's, says nothing.
    """
    grey = picture.mode in {"1", "L", "LA"} or picture.mode.startswith("I")
    mode = "L" if grey else "CMYK" if picture.mode == "CMYK" else "RGB"
    if profile := picture.info.get("icc_profile"):
        transform, remark = _transform(bytes(profile), mode), ICC
    elif picture.format == "PNG" and "srgb" not in picture.info:
        built = _png_profile(picture.info, grey)
        mode = "RGB"
        transform, remark = _transform(built, mode) if built else None, GAMMA
    else:
        return None, ""
    if transform is None:
        return None, ""

    def convert(whole: Image.Image) -> Image.Image:
        plain = whole if whole.mode == mode else whole.convert(mode)
        converted = transform.apply(plain)
        assert converted is not None
        return converted

    return convert, remark


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return a transform to sRGB; None for a damaged profile, other channels, or sRGB itself."""
    if len(profile) > _LARGEST:
        return None
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transforms = [
            ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
            for intent in _INTENTS
        ]
        return None if any(_changes_nothing(each, mode) for each in transforms) else transforms[0]
    except _DAMAGE:
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell a transform from sRGB to sRGB by the colours of a grid."""
    if mode == "CMYK":
        return False
    steps = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    axes = np.meshgrid(*[steps] * len(mode), indexing="ij")
    grid = np.stack(axes, axis=-1).reshape(1, -1, len(mode)).squeeze(-1 if mode == "L" else ())
    picture = Image.fromarray(grid)
    converted = transform.apply(picture)
    assert converted is not None
    before, after = (np.asarray(each).astype(int) for each in (picture.convert("RGB"), converted))
    return bool(abs(before - after).max() <= _SAME)


def _png_profile(info: dict[Any, Any], grey: bool) -> bytes | None:
    """Return the profile that a PNG's gamma and primaries stand for; None if they are sRGB's."""
    gamma, primaries = info.get("gamma") or _GAMMA, info.get("chromaticity") or _PRIMARIES
    own_gamma = abs(gamma / _GAMMA - 1) > 0.05
    own_primaries = not grey and not np.allclose(primaries, _PRIMARIES, atol=0.005)
    if not (own_gamma or own_primaries) or not 0.01 < gamma < 100:
        return None
    # Files of sRGB pictures state 1 / 2.2, which stands for sRGB's own curve.
    curve = (1 / gamma,) if own_gamma else (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return _matrix_profile(tuple(primaries if own_primaries else _PRIMARIES), curve)


@lru_cache(maxsize=16)
def _matrix_profile(primaries: tuple[float, ...], curve: tuple[float, ...]) -> bytes | None:
    """Write an ICC profile of three primaries and one curve, adapted to D50 by Bradford.

    Args:
        primaries: x and y of white, red, green and blue.
        curve: parameters of a parametric curve of ICC.1:2022, table 68: gamma only, or five.

    Returns:
        None if no colours have these primaries.
    """
    if min(primaries[1::2]) <= 0 or not all(map(math.isfinite, primaries)):
        return None
    pairs = zip(primaries[::2], primaries[1::2], strict=True)
    white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in pairs)
    matrix = np.array(colours).T
    if abs(np.linalg.det(matrix)) < 1e-6 or min(_BRADFORD @ white) <= 0:
        return None
    matrix = matrix * np.linalg.solve(matrix, white)
    adapt = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    matrix = np.linalg.inv(_BRADFORD) @ adapt @ _BRADFORD @ matrix
    if abs(matrix).max() >= 2**15:
        return None
    kind = struct.pack(">4sIHH", b"para", 0, 0 if len(curve) == 1 else 3, 0) + _fixed(curve)
    text = b"text" + bytes(4) + b"PNG\0"
    tags = [(b"wtpt", b"XYZ " + bytes(4) + _fixed(_D50)), (b"cprt", text)]
    for number, name in enumerate((b"r", b"g", b"b")):
        tags += [(name + b"XYZ", b"XYZ " + bytes(4) + _fixed(matrix[:, number]))]
        tags += [(name + b"TRC", kind)]
    tags.append((b"desc", _description(b"PNG")))
    return _file_of(tags)


def _file_of(tags: list[tuple[bytes, bytes]]) -> bytes:
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags:
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI", start + len(data), b"", 0x02400000) + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + _fixed(_D50) + bytes(48)
    return head + table + data


def _description(text: bytes) -> bytes:
    size = struct.pack(">I", len(text) + 1)
    return b"desc" + bytes(4) + size + text + bytes(1 + 78)


def _fixed(values: Any) -> bytes:
    """Return numbers as s15Fixed16."""
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)
