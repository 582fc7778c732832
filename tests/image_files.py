"""Small generated pictures, and the ways in which they are stored."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.config import ImageDataConfig, ImageSourceConfig
from sfumato.data.sample import Sample
from sfumato.data.stream import Stream


def gradient(height: int, width: int, number: int = 0) -> np.ndarray:
    """Return a picture (H, W, 3) whose pixels all differ; `number` makes it another one."""
    y, x = np.mgrid[:height, :width]
    planes = (y * 251 // max(1, height - 1), x * 251 // max(1, width - 1), y * 0 + number % 256)
    return np.stack(planes, axis=-1).astype(np.uint8)


def encode(picture: Image.Image, kind: str = "PNG", exif: Image.Exif | None = None) -> bytes:
    """Return the bytes of a file."""
    file = io.BytesIO()
    if exif is None:
        picture.save(file, kind)
    else:
        picture.save(file, kind, exif=exif)
    return file.getvalue()


def png(height: int = 8, width: int = 8, number: int = 0) -> bytes:
    return encode(Image.fromarray(gradient(height, width, number)))


def write_folder(folder: Path, sizes: Sequence[tuple[int, int]], prefix: str = "") -> Path:
    """Write a picture and a caption for each (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(sizes):
        (folder / f"{prefix}{i:03d}.png").write_bytes(png(height, width, i))
        (folder / f"{prefix}{i:03d}.txt").write_text(f"{prefix}picture {i}")
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def config_of(*paths: Path | str, **settings: bool | int | str) -> ImageDataConfig:
    """Return settings that read these paths, decoding in the caller."""
    sources = {f"s{i}": ImageSourceConfig(str(path)) for i, path in enumerate(paths)}
    config = ImageDataConfig(sources=sources, workers=0)
    for name, value in settings.items():
        assert name in vars(config)
        vars(config)[name] = value
    return config


def skip_counts(stream: Stream[Sample]) -> dict[str, int]:
    return {skip.reason: skip.count for skip in stream.skipped.skips}
